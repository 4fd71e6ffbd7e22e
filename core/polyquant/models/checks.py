"""Checks a model's files before anything heavy reads them: present, whole, safe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from polyquant.errors import ModelError
from polyquant.models import marks
from polyquant.models.gguf_header import parts_of
from polyquant.models.headers import small_header, stored_headers
from polyquant.models.patterns import unbounded
from polyquant.request import ModelSource
from polyquant.types import UNREADABLE

INDEX = "model.safetensors.index.json"
GGUF_MAGIC = b"GGUF"
CONFIG_LIMIT_BYTES = 4 * 2**20
INDEX_LIMIT_BYTES = 64 * 2**20
DEEPEST = 50  # objects within objects of a config
COUNTED = {"layers": 1000, "n_layer": 1000, "experts": 5000}  # ends of the names of numbers of modules -> most
MOST_EXPERTS = 50_000  # of all layers


def check_gguf(path: Path, name: str) -> ModelSource:
    """A single weights file, or the first of its parts. Raises ModelError where it is not a GGUF."""
    with path.open("rb") as file:
        magic = file.read(len(GGUF_MAGIC))
    if magic != GGUF_MAGIC:
        raise ModelError(f"{name} is not a GGUF file (it starts with {magic!r}); give the model's folder instead")
    parts = tuple(part.name for part in parts_of(path))
    return ModelSource(name=name, path=path.parent, gguf_file=path.name, weight_files=parts)


def check_folder(path: Path, name: str, *, allow_pickle: bool = False) -> ModelSource:
    """A checkpoint folder. Raises ModelError where it has no readable config or no safe, whole weights."""
    files = sorted(child.name for child in path.iterdir() if child.is_file())
    if not files:
        raise ModelError(f"{name}: the folder is empty; a model folder has config.json and *.safetensors")
    if "config.json" not in files:
        gguf = [file for file in files if file.endswith(".gguf")]
        if gguf and gguf == [part.name for part in parts_of(path / gguf[0])]:
            return check_gguf(path / gguf[0], name)
        hint = f"it has several GGUF files, name the one to load: {path / gguf[0]}" if gguf else "is it a model folder?"
        raise ModelError(f"{name}: no config.json among {_shown(files)}; {hint}")
    config = with_method(read_object(path / "config.json", name), path, name, files)
    weights = _weight_files(path, name, files, allow_pickle)
    for file in weights:
        if file.endswith(".safetensors"):
            _check_safetensors(path / file, name)
    source = ModelSource(name=name, path=path, config=config, weight_files=tuple(weights))
    if not weights or not weights[0].endswith(".safetensors"):
        return source
    try:
        headers = stored_headers(source)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error
    told = marks.require_told(config, headers, name)
    return source if told is config else replace(source, config=told)


def with_method(config: dict[str, Any], path: Path, name: str, files: list[str]) -> dict[str, Any]:
    """`config` with the quantization config that a mark tells, its own or that of a file beside it; see `marks`.

    Raises ModelError where either is not what such a file holds.
    """
    require_plausible(config, name)
    whole = marks.with_method(config, lambda file: read_object(path / file, name) if file in files else None)
    if whole is not config:
        require_plausible(whole, name)
    return whole


def require_plausible(config: dict[str, Any], name: str) -> None:
    """Raises ModelError where a config's known parts have the wrong type, or ask for what no config may ask for.

    That is more layers than any model has (a skeleton is built module by module, so a number alone could keep it busy
    for ever), and compiled code: transformers fetches an attention implementation that is called like a hub repository.
    """
    for key in ("quantization_config", "text_config"):
        if not isinstance(config.get(key) or {}, dict):
            raise ModelError(f"{name}: {key} in its config must be an object, it is {config[key]!r:.60}")
    if config.get("quantization_config") == {}:
        raise ModelError(
            f"{name}: quantization_config in its config is empty, and so neither dense nor quantized; write there how "
            "it was quantized, or take it out to load a dense model"
        )
    if not isinstance(config.get("model_type", ""), str):
        raise ModelError(f"{name}: model_type in its config must be text, it is {config['model_type']!r:.60}")
    for key, value in config.items():
        if "_implementation" in key and "/" in str(value):
            raise ModelError(
                f"{name}: its config asks for {value!r:.80}, compiled code from the hub; take {key} out of config.json,"
                " and name it yourself if you trust it: attention=... (--attention)"
            )
        if isinstance(value, dict):
            require_plausible(value, name)
    _require_countable(config, name)
    if why := unbounded(config.get("quantization_config")):
        raise ModelError(f"{name}: its quantization_config cannot be used: {why}")


def _require_countable(config: dict[str, Any], name: str) -> None:
    counts: dict[str, int] = {}
    for key, value in config.items():
        end = next((end for end in COUNTED if key.endswith(end)), None)
        if end is not None and isinstance(value, int):
            counts[end] = max(value, counts.get(end, 0))
            if value > COUNTED[end]:
                raise ModelError(f"{name}: its config says {key} = {value}; at most {COUNTED[end]} are believed")
    layers = max(counts.get("layers", 0), counts.get("n_layer", 0))
    if (experts := layers * counts.get("experts", 0)) > MOST_EXPERTS:
        raise ModelError(
            f"{name}: its config asks for {experts} experts in {layers} layers; {MOST_EXPERTS} are believed"
        )


def _weight_files(path: Path, name: str, files: list[str], allow_pickle: bool) -> list[str]:
    if INDEX in files:
        wanted = sorted(set(_read_index(path / INDEX, name).values()))
        outside = [shard for shard in wanted if Path(shard).name != shard]
        if outside:
            raise ModelError(f"{name}: {INDEX} names files outside the folder: {_shown(outside)}")
        other = [shard for shard in wanted if not shard.endswith(".safetensors")]
        if other:
            raise ModelError(f"{name}: {INDEX} names files that are no safetensors: {_shown(other)}; fetch it again")
        missing = [shard for shard in wanted if shard not in files]
        if missing:
            raise ModelError(
                f"{name}: {len(missing)} of {len(wanted)} shards are missing: {_shown(missing)}; fetch them"
            )
        return wanted
    if weights := [file for file in files if file.endswith(".safetensors") and not file.startswith("adapter_")]:
        return weights
    pickles = [file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles and allow_pickle:
        return pickles
    if pickles:
        raise ModelError(
            f"{name} has only pickle weights ({_shown(pickles)}), and loading a pickle can run any code; "
            "take a safetensors copy, or allow it with allow_pickle=True (--allow-pickle) if you trust the author"
        )
    raise ModelError(f"{name}: no weights (*.safetensors) among {_shown(files)}; was the download finished?")


def _check_safetensors(path: Path, name: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        small_header(path)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = len(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size
        raise ModelError(
            f"{name}: {path.name} ({size} bytes) is truncated or damaged ({error}); fetch or write it again"
        ) from error
    if tensors == 0:
        raise ModelError(f"{name}: {path.name} holds no tensors; fetch or write it again")


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _read_index(path: Path, name: str) -> dict[str, str]:
    """Tensor -> file."""
    if path.stat().st_size > INDEX_LIMIT_BYTES:
        raise ModelError(f"{name}: {path.name} is larger than {INDEX_LIMIT_BYTES} bytes; it is no index")
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Index).weight_map
    except msgspec.ValidationError as error:
        raise ModelError(f"{name}: {INDEX} has no weight_map from tensor names to file names ({error})") from error
    except UNREADABLE as error:
        raise ModelError(f"{name}: {path.name} is not readable JSON ({error}); fetch or write it again") from error


def read_object(path: Path, name: str) -> dict[str, Any]:
    """A JSON object of a config's size. Raises ModelError where it is none, or nested deeper than any config."""
    if path.stat().st_size > CONFIG_LIMIT_BYTES:
        raise ModelError(f"{name}: {path.name} is larger than {CONFIG_LIMIT_BYTES} bytes; it is no config")
    try:
        content = msgspec.json.decode(path.read_bytes())
    except UNREADABLE as error:
        raise ModelError(f"{name}: {path.name} is not readable JSON ({error}); fetch or write it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{name}: {path.name} must hold a JSON object, it holds {type(content).__name__}")
    level: list[Any] = [content]
    for _ in range(DEEPEST):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inner for value in values if isinstance(value, (dict, list))]
    if level:
        raise ModelError(f"{name}: {path.name} is nested deeper than {DEEPEST} levels; it is no config")
    return content


def _shown(files: list[str]) -> str:
    return ", ".join(files[:6]) + (f" and {len(files) - 6} more" if len(files) > 6 else "")
