"""Safetensors headers, of local files and of hub repositories, held against the file's size before they are believed.

Format: https://huggingface.co/docs/safetensors: eight bytes of length, JSON, then the tensors without gaps.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from polyquant.errors import ModelError
from polyquant.request import ModelSource
from polyquant.types import UNREADABLE

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "C64": "complex64",
}  # fmt: skip
LENGTH_BYTES = 8
HEADER_LIMIT_BYTES = 32 * 2**20  # the format itself allows 100 MB, which takes minutes and gigabytes to look at
MOST_TENSORS = 200_000  # of one file


class StoredTensor(NamedTuple):
    """A tensor as a checkpoint has it."""

    dtype: str  # torch's name
    shape: tuple[int, ...]
    nbytes: int


class Headers(NamedTuple):
    """What the safetensors files of a checkpoint say before their data."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]  # of all files; of a key that several have, the last one's


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a local file, from its header alone. Raises ModelError for a header that lies."""
    return {name: tensor for name, (tensor, _) in located_tensors(path).items()}


def stored_tensors(source: ModelSource) -> Mapping[str, StoredTensor]:
    """The tensors in the safetensors files of `source`."""
    return stored_headers(source).tensors


def stored_headers(source: ModelSource) -> Headers:
    """The headers of the safetensors files of `source`, which are read once as long as they do not change."""
    files = [source.path / file for file in source.weight_files if file.endswith(".safetensors")]
    stats = [(file, file.stat()) for file in files]
    return _headers(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats))


@lru_cache(maxsize=16)
def _headers(files: tuple[tuple[Path, int, int], ...]) -> Headers:
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for file, _, _ in files:
        located, said = _read(file)
        tensors |= {name: tensor for name, (tensor, _) in located.items()}
        metadata |= said
    return Headers(tensors, metadata)


def located_tensors(path: Path) -> dict[str, tuple[StoredTensor, int]]:
    """`read_safetensors`, and where each tensor begins, in bytes from the start of the file."""
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, tuple[StoredTensor, int]], dict[str, str]]:
    """The tensors of a file, each with where it begins, and its metadata."""
    entries, metadata, start = _read_entries(path)
    rows = {name: (entry.dtype, entry.shape, entry.data_offsets) for name, entry in entries.items()}
    tensors = checked(path.name, rows, path.stat().st_size - start)
    return {name: (tensor, start + rows[name][2][0]) for name, tensor in tensors.items()}, metadata


def small_header(path: Path) -> tuple[int, bytes]:
    """The length that a local file claims for its header, and the header, not parsed: shorter where the file is.

    Raises ModelError for one that takes long to look at.
    """
    with path.open("rb") as file:
        claimed = int.from_bytes(file.read(LENGTH_BYTES), "little")
        length = min(claimed, path.stat().st_size)
        if length > HEADER_LIMIT_BYTES:
            raise ModelError(f"{path.name}: its header has {length} bytes; at most {HEADER_LIMIT_BYTES} are read")
        content = file.read(length)
    if (tensors := content.count(b'"data_offsets"')) > MOST_TENSORS:
        raise ModelError(f"{path.name}: its header has {tensors} tensors; at most {MOST_TENSORS} are read")
    return claimed, content


def _read_entries(path: Path) -> tuple[dict[str, _Entry], dict[str, str], int]:
    """The entries of a header as they stand, its metadata, and the byte after it."""
    (claimed, content), size = small_header(path), path.stat().st_size
    if claimed > size - LENGTH_BYTES:
        raise ModelError(f"{path.name}: its header claims {claimed} bytes, and the file has {size}; fetch it again")
    try:
        header = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
        entries = {
            name: msgspec.json.decode(raw, type=_Entry) for name, raw in header.items() if name != "__metadata__"
        }
        metadata = msgspec.json.decode(header["__metadata__"], type=dict[str, str]) if "__metadata__" in header else {}
    except UNREADABLE as error:
        raise ModelError(f"{path.name}: its header is not readable JSON ({error}); fetch or write it again") from error
    return entries, metadata, LENGTH_BYTES + len(content)


def checked(
    file: str, rows: Mapping[str, tuple[str, tuple[int, ...], tuple[int, int]]], data_bytes: int | None
) -> dict[str, StoredTensor]:
    """The tensors of a file: name -> (dtype, shape, offsets), each held against the others and against the file.

    data_bytes: what follows the header; None where it is not known. Raises ModelError for an unknown dtype, a negative
    or absurd shape, offsets that do not hold the shape, that overlap, or that lead out of the file.
    """

    def lie(what: str) -> ModelError:
        return ModelError(f"{file}: its header cannot be true: {what}; fetch or write it again")

    found: dict[str, StoredTensor] = {}
    for name, (dtype, shape, (begin, end)) in rows.items():
        if dtype not in DTYPE_BITS:
            raise ModelError(f"{file}: {name} has the dtype {dtype!r}; known are {', '.join(DTYPE_BITS)}")
        if any(length < 0 for length in shape) or prod(shape) >= 2**63:
            raise lie(f"{name} has the shape {tuple(shape)}")
        nbytes = -(-prod(shape) * DTYPE_BITS[dtype] // 8)
        if begin < 0 or end - begin != nbytes:
            raise lie(f"{name} {dtype} {tuple(shape)} takes {nbytes} bytes, and its offsets are {begin} to {end}")
        if data_bytes is not None and end > data_bytes:
            raise lie(f"{name} ends at byte {end}, and {data_bytes} bytes follow the header")
        found[name] = StoredTensor(TORCH_NAMES.get(dtype, dtype), tuple(shape), nbytes)
    ordered = sorted((offsets, name) for name, (_, _, offsets) in rows.items() if offsets[0] < offsets[1])
    for ((_, end), one), ((begin, _), other) in pairwise(ordered):
        if end > begin:
            raise lie(f"{one} and {other} overlap")
    return found


def read_hub_repository(name: str, revision: str | None, info: Any) -> Headers:
    """The headers of a hub repository, by range requests on its files' heads: no weights are fetched.

    info: of `huggingface_hub.model_info(files_metadata=True)`. Raises ModelError where a header lies.
    """
    import huggingface_hub
    from huggingface_hub import errors

    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
    try:
        metadata = huggingface_hub.get_safetensors_metadata(name, revision=revision)
    except errors.NotASafetensorsRepoError as error:
        weights = [file for file in sizes if file.endswith((".gguf", ".bin", ".pt", ".pth", ".safetensors"))]
        raise ModelError(
            f"{name} has no model.safetensors; its weight files are {', '.join(weights[:6]) or 'none'}; "
            "plan from a copy in safetensors, from a .gguf file that is here, or from its config.json alone"
        ) from error
    except errors.SafetensorsParsingError as error:
        raise ModelError(f"{name}: a safetensors header cannot be read: {error}") from error
    tensors: dict[str, StoredTensor] = {}
    said: dict[str, str] = {}
    for file, content in metadata.files_metadata.items():
        said |= content.metadata
        rows = {
            tensor: (entry.dtype, tuple(entry.shape), tuple(entry.data_offsets))
            for tensor, entry in content.tensors.items()
        }
        size = sizes.get(file)
        tensors |= checked(f"{name}: {file}", rows, None if size is None else size - LENGTH_BYTES)
    return Headers(tensors, said)
