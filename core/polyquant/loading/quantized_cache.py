"""Quantized weights that are kept in the user's cache: the second load of the same maps them, and quantizes nothing.

Kept are packed models whose every quantized weight polyquant's own runtime multiplies with, on a CPU. An entry's key is
of all that goes into it: what the files of the dense model hold, backend, options, versions and sources. It is written
all or nothing, and its hash is proven when it is first read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from polyquant.errors import ModelError, SaveError
from polyquant.loaded import LoadedModel
from polyquant.loading.entries import ENTRY, FOLDER, SIZE, Entry, delete, make_room, most_bytes
from polyquant.loading.settle import Settled
from polyquant.models.hashing import content_hash
from polyquant.models.headers import TORCH_NAMES
from polyquant.packable import is_packed
from polyquant.packed_weights import kernels
from polyquant.registry.backend import Backend
from polyquant.registry.hooks import package_of
from polyquant.request import LoadRequest
from polyquant.support.cache import cache_folder
from polyquant.support.files import once
from polyquant.support.libraries import installed_version
from polyquant.support.sizes import size
from polyquant.types import UNREADABLE

LAYOUT = 1  # of what is kept
MODULES, WEIGHTS, PROVEN = "modules.json", "model.safetensors", "proven"
LEAST_BYTES = 2**26  # of a checkpoint: a smaller one is quantized in a moment
DTYPES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
"""torch's names of dtypes -> those of safetensors."""


def is_kept(backend: Backend, request: LoadRequest, settled: Settled) -> bool:
    """Whether such a load is kept: on a CPU, quantized now, all of it in the packed layout, and not in a moment."""
    return (
        settled.route in ("on the fly", "dense first")
        and is_packed(settled.options)
        and backend.capabilities.runs_on_torch
        and {str(device) for device in request.device_map.values()} == {"cpu"}
        and not request.trust_remote_code  # code that may do anything
        and request.source.checkpoint_bytes >= LEAST_BYTES
        and kernels.library() is not None
    )


def place_of(backend: Backend, request: LoadRequest, settled: Settled) -> Path:
    """The folder of such a load, whether it is there or not."""
    asked = {
        "layout": LAYOUT, "content": content_hash(request.source), "backend": backend.name, "dtype": settled.dtype,
        "options": msgspec.to_builtins(settled.options), "versions": _versions(backend),
        "sources": [_sources(name.partition(".")[0]) for name in ("polyquant", package_of(backend.plugin))],
    }  # fmt: skip
    return cache_folder() / FOLDER / hashlib.sha256(msgspec.json.encode(asked, order="deterministic")).hexdigest()[:32]


def restore(folder: Path, backend: Backend, request: LoadRequest, settled: Settled) -> LoadedModel | None:
    """The model that is kept in a folder; None where nothing is, or nothing whole: that is deleted."""
    if not folder.is_dir():
        return None
    try:
        entry = msgspec.json.decode((folder / ENTRY).read_bytes(), type=Entry)
        _prove(folder, entry)
        loaded = backend.take(lambda: _read(folder, entry, request, settled), request, settled)
    except (OSError, ModelError, msgspec.ValidationError, *UNREADABLE):
        delete(folder)
        return None
    os.utime(folder / ENTRY)
    loaded.notes[:] = [*entry.notes, f"its weights were quantized on {entry.created[:10]} and come from the cache: "
                       "cache=False (--no-cache) quantizes them again"]  # fmt: skip
    return loaded


def keep(folder: Path, loaded: LoadedModel, backend: Backend) -> None:
    """Keep a model that was just loaded, for the next load; why it is not goes into its notes."""
    from polyquant.registry import repacked, restored

    if loaded.settled is None or loaded.request is None or repacked.left_with_library(loaded.model, backend):
        return
    modules, tensors = restored.stored_modules(loaded.model), restored.stored_tensors(loaded.model)
    limit, nbytes = most_bytes(), sum(tensor.nbytes for tensor in tensors.values())
    if nbytes > limit:
        loaded.notes.append(f"not kept for the next load: {size(nbytes)} are more than {SIZE}, {size(limit)}")
        return
    stored = loaded.model.config.quantization_config
    source, options, notes = loaded.request.source, msgspec.to_builtins(loaded.settled.options), tuple(loaded.notes)

    def write(out: Path) -> None:
        digest = _write_tensors(out / WEIGHTS, tensors)
        (out / MODULES).write_bytes(msgspec.json.encode(modules))
        entry = Entry(
            model=source.name,
            backend=backend.name,
            options=options,
            versions=_versions(backend),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            stored_bytes=(out / WEIGHTS).stat().st_size,
            sha256=digest,
            quantization_config=dict(stored) if isinstance(stored, Mapping) else stored.to_dict(),
            is_transformers=not isinstance(stored, Mapping),
            notes=notes,
        )
        (out / ENTRY).write_text(entry.to_json(), encoding="utf-8")

    try:
        once(folder, write)
        make_room(limit, but=folder)
    except (OSError, SaveError) as error:
        loaded.notes.append(f"not kept for the next load: {error}")


def _read(folder: Path, entry: Entry, request: LoadRequest, settled: Settled) -> LoadedModel:
    """The model of an entry, whose tensors are the file's pages. Raises ModelError, OSError."""
    from safetensors import SafetensorError, safe_open
    from transformers.quantizers.auto import AutoQuantizationConfig

    from polyquant.packed_weights import step
    from polyquant.registry import restored

    modules = msgspec.json.decode((folder / MODULES).read_bytes(), type=list[restored.StoredModule])
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except SafetensorError as error:
        raise ModelError(f"{folder / WEIGHTS}: {error}") from error
    model = restored.restore(request, settled.dtype, modules, tensors)
    model.config.quantization_config = (
        AutoQuantizationConfig.from_dict(entry.quantization_config) if entry.is_transformers
        else entry.quantization_config
    )  # fmt: skip
    kernel = f"{kernels.name()}, whole steps" if step.attach(model) else kernels.name()
    return LoadedModel(model=model, config=settled.options, kernel=kernel)


def _prove(folder: Path, entry: Entry) -> None:
    """Raises ModelError where the file of weights is not the one that was written; once for as long as it stays."""
    status = (folder / WEIGHTS).stat()
    mark, seen = folder / PROVEN, f"{status.st_size} {status.st_mtime_ns}"
    with suppress(OSError):
        if mark.read_text(encoding="utf-8") == seen:
            return
    with (folder / WEIGHTS).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            raise ModelError(f"{folder / WEIGHTS} is damaged")
    with suppress(OSError):  # of a cache that may only be read: it is proven again
        mark.write_text(seen, encoding="utf-8")


def _write_tensors(path: Path, tensors: dict[str, Any]) -> str:
    """Write a safetensors file, tensor by tensor and without a copy of all; the SHA-256 of what was written.

    The library's own writer copies every tensor first.
    """
    import torch

    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # each aligned to its numbers
    header, at = dict[str, Any](), 0
    for name in names:
        tensor = tensors[name]
        dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    head = msgspec.json.encode(header)
    head += b" " * (-len(head) % 64)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(content: Any) -> None:
            digest.update(content)
            file.write(content)

        write(len(head).to_bytes(8, "little"))
        write(head)
        for name in names:
            if tensors[name].numel():
                write(memoryview(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _versions(backend: Backend) -> dict[str, str]:
    """The versions of what quantizes and packs."""
    libraries = [library.distribution for library in backend.info.libraries]
    names = ("polyquant", "polyquant-kernels", "torch", "transformers", *libraries)
    own = {name: version for name in names if (version := installed_version(name)) is not None}
    return {**own, "plugin": backend.origin}


@cache
def _sources(package: str) -> str:
    """Of a package's Python files, their sizes and times: so that an author sees what was changed."""
    spec = find_spec(package)
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    files = sorted(path for place in places for path in place.rglob("*.py"))
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()
