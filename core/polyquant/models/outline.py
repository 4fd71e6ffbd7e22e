"""What can be known of a model without reading its weights: its config, and the headers of its weight files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from typing import NamedTuple

from polyquant.errors import ModelError, did_you_mean
from polyquant.models import checks, marks
from polyquant.models.gguf_header import read_header
from polyquant.models.gguf_types import FLOAT_DTYPES
from polyquant.models.headers import StoredTensor, read_hub_repository, stored_tensors
from polyquant.models.resolve import on_disk, refusal
from polyquant.request import ModelSource

HUB_FILES = ["config.json", "*.py"]  # and what holds quantization configs beside it


class Outline(NamedTuple):
    """A model as far as headers and config tell."""

    source: ModelSource
    tensors: Mapping[str, StoredTensor]  # of the checkpoint, under its own names; empty where only a config is there
    checkpoint_bytes: int  # of the weight files; 0 where there are none

    @property
    def dtype(self) -> str:
        """The dtype that most bytes of the checkpoint have, else the config's; bfloat16 where neither says."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += tensor.nbytes
        if sizes:
            return sizes.most_common(1)[0][0]
        config = self.source.config
        return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")


def outline(model: str | Path, *, revision: str | None = None) -> Outline:
    """What is known of `model` without its weights.

    model: a local folder, a `.gguf` file, a `config.json` (or a folder that holds nothing else), a hub name, or a
        builtin model, which is the packaged GGUF.
    Raises ModelError for headers that lie and for configs whose architecture transformers does not know.
    """
    found = _find(model, revision)
    if found.source.config:
        _check_config(found.source)
    return found


def _find(model: str | Path, revision: str | None) -> Outline:
    if alone := _config_alone(Path(model).expanduser(), str(model)):
        return Outline(alone, {}, 0)
    source = on_disk(model)
    return outline_of(source) if source else _of_hub(str(model), revision)


def _config_alone(path: Path, name: str) -> ModelSource | None:
    """A config.json without weights: the file itself, or a folder that holds nothing else of a model."""
    if path.suffix == ".json" and path.is_file():
        config = checks.read_object(path, name)
        checks.require_plausible(config, name)
        return ModelSource(name=name, path=path, config=config)
    files = [child.name for child in path.iterdir() if child.is_file()] if path.is_dir() else []
    weights = [file for file in files if file.endswith((".safetensors", ".gguf", ".bin", ".pt", ".pth"))]
    if "config.json" not in files or weights or checks.INDEX in files:
        return None
    config = checks.with_method(checks.read_object(path / "config.json", name), path, name, files)
    return ModelSource(name=name, path=path, config=config)


def outline_of(source: ModelSource) -> Outline:
    """What the headers of checked files say; of pickles nothing but their size."""
    if source.gguf_file:
        return _of_gguf(source)
    return Outline(source, stored_tensors(source), source.checkpoint_bytes)


def _of_gguf(source: ModelSource) -> Outline:
    header = read_header(source.path / source.gguf_file)
    tensors = {
        entry.name: StoredTensor(FLOAT_DTYPES.get(entry.type.name, entry.type.name), entry.shape, entry.nbytes)
        for entry in header.tensors.values()
    }
    return Outline(source, tensors, source.checkpoint_bytes)


def _of_hub(name: str, revision: str | None) -> Outline:
    import huggingface_hub
    from huggingface_hub import errors

    from polyquant.models import versions

    try:
        with versions.progress_bars(enabled=False):
            info = huggingface_hub.model_info(name, revision=revision, files_metadata=True)
            wanted = [*HUB_FILES, *marks.side_files()]
            small = [file.rfilename for file in info.siblings or () if any(fnmatch(file.rfilename, p) for p in wanted)]
            paths = [Path(huggingface_hub.hf_hub_download(name, file, revision=revision)) for file in small]
            headers = read_hub_repository(name, revision, info)
    except (errors.HFValidationError, errors.RepositoryNotFoundError) as error:
        raise refusal(name, error) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        return _of_cached_repository(name, revision, error)
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "requests")):  # the hub's client has had several of these
            raise
        return _of_cached_repository(name, revision, error)
    config_path = next((path for path in paths if path.name == "config.json"), None)
    if config_path is None:
        raise ModelError(f"{name} has no config.json; is it a model of transformers?")
    folder = config_path.parent
    config = checks.with_method(checks.read_object(config_path, name), folder, name, small)
    source = ModelSource(name=name, path=folder, config=marks.require_told(config, headers, name))
    return Outline(source, headers.tensors, sum(tensor.nbytes for tensor in headers.tensors.values()))


def _of_cached_repository(name: str, revision: str | None, reason: Exception) -> Outline:
    """What the hub's cache on this machine holds of a repository, where the hub cannot be reached."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True)
    except (errors.LocalEntryNotFoundError, OSError):
        raise ModelError(
            f"{name}: no such folder here, not in the hub's cache, and the hub cannot be reached "
            f"({type(reason).__name__}); give a local folder, a .gguf file or a config.json, try builtin:smollm2, "
            "or unset HF_HUB_OFFLINE and check the network"
        ) from reason
    alone = _config_alone(Path(folder), name)
    return Outline(alone, {}, 0) if alone else outline_of(checks.check_folder(Path(folder), name))


def _check_config(source: ModelSource) -> None:
    """Raises ModelError for an architecture that transformers does not know."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = source.config.get("model_type")
    if not kind:
        raise ModelError(f"{source.name}: its config names no model_type; is it the config.json of a model?")
    if kind not in CONFIG_MAPPING and "auto_map" not in source.config:
        import transformers

        raise ModelError(
            f"{source.name}: its architecture {kind!r} is not one that transformers {transformers.__version__} knows; "
            f"update transformers, or take another model.{did_you_mean(str(kind), CONFIG_MAPPING.keys())}"
        )
