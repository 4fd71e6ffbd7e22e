"""Finds a model: a local folder, a `.gguf` file, `builtin:` names, or a repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from polyquant.errors import ModelError
from polyquant.models import builtin, checks
from polyquant.request import ModelSource
from polyquant.support.paths import require_utf8

HUB_FILES = [
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.py",
    "model*.safetensors",
    "gptq_model*.safetensors",
    "packed*.safetensors",  # checkpoints of polyquant's that transformers must not take for its own
]
PICKLE_FILES = ["pytorch_model*.bin"]


def resolve(
    model: str | Path, *, revision: str | None = None, allow_pickle: bool = False, progress: bool = False
) -> ModelSource:
    """The checked files of `model`; a hub repository is downloaded into the hub's cache first.

    A builtin model is the packaged GGUF, marked as such; `resolve_dense` gives the dense checkpoint made of it.
    Raises ModelError, which says what is there and what to do.
    """
    return on_disk(model, allow_pickle=allow_pickle) or _from_hub(str(model), revision, allow_pickle, progress)


def on_disk(model: str | Path, *, allow_pickle: bool = False) -> ModelSource | None:
    """The checked files of a folder, a file or a builtin model; None where `model` can only be a name on the hub."""
    name = str(model)
    require_utf8(name)
    if name.startswith(builtin.PREFIX):
        return builtin.packaged_source(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return checks.check_folder(path, name, allow_pickle=allow_pickle)
    if path.is_file():
        return checks.check_gguf(path, name)
    if isinstance(model, Path) or path.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: no such file or folder; {_neighbours(path)}")
    if name.endswith((".gguf", ".json")):
        raise ModelError(f"{name}: no such file; {_neighbours(path)}")
    return None


def resolve_dense(model: str | Path) -> ModelSource:
    """`resolve`, and of a builtin model the dense checkpoint, which is made on first use (under a minute)."""
    source = resolve(model)
    return dense_of(source) if source.packaged else source


def dense_of(source: ModelSource, *, progress: bool = False) -> ModelSource:
    """The dense float32 checkpoint of a GGUF, made on first use."""
    return checks.check_folder(builtin.dense_from_gguf(source, progress=progress), source.name)


def _neighbours(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"{parent} does not exist either"
    names = sorted(child.name for child in parent.iterdir())[:8]
    return f"{parent} holds {', '.join(names) or 'nothing'}"


def _from_hub(name: str, revision: str | None, allow_pickle: bool, progress: bool) -> ModelSource:
    import huggingface_hub
    from huggingface_hub import errors

    from polyquant.models import versions

    patterns = HUB_FILES + (PICKLE_FILES if allow_pickle else [])
    try:
        with versions.progress_bars(progress):
            folder = huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
            )
    except (errors.HFValidationError, errors.RepositoryNotFoundError) as error:
        raise refusal(name, error) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise ModelError(
            f"{name}: no such folder here, not in the hub's cache, and the hub cannot be reached "
            f"({type(error).__name__}); "
            "give a local folder or a .gguf file, try builtin:smollm2, or unset HF_HUB_OFFLINE and check the network"
        ) from error
    return checks.check_folder(Path(folder), name, allow_pickle=allow_pickle)


def refusal(name: str, error: Exception) -> ModelError:
    """What a HFValidationError or RepositoryNotFoundError of the hub means for the user."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return ModelError(f"{name!r} is neither a file, a folder nor a hub name (owner/name): {error}")
    if isinstance(error, errors.GatedRepoError):
        return ModelError(f"{name} is gated: accept its terms on the hub, then run: hf auth login")
    return ModelError(f"{name}: no such folder here and no such repository on the hub ({error})")
