"""Quantized weights that are kept in the user's cache: the second load of the same maps them, and quantizes nothing.

Kept are packed models whose every quantized weight polyquant's own runtime multiplies with, on a CPU. An entry's key is
of all that goes into it: what the files of the model hold, backend, options, versions and sources. It is written
all or nothing, and its hash is proven when it is first read.

A model that is larger than the memory (`offload="disk"`) runs from its entry: while it is made, each layer is in the
entry's file as soon as it is packed, and what runs is always what was read from there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from polyquant.errors import BackendFailed, ConfigError, ModelError, SaveError
from polyquant.loaded import LoadedModel
from polyquant.loading.disk import require_space
from polyquant.loading.entries import ENTRY, FOLDER, SIZE, Entry, delete, make_room, most_bytes
from polyquant.loading.settle import Settled
from polyquant.models.hashing import content_hash
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

if TYPE_CHECKING:
    from polyquant.packed_weights.tensor_file import TensorWriter

LAYOUT = 2  # of what is kept
MODULES, WEIGHTS, PROVEN = "modules.json", "model.safetensors", "proven"
PARTS_OF_EACH = 6  # tensors that a packed weight has at most
LEAST_BYTES = 2**26  # of a checkpoint: a smaller one is quantized in a moment


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
    with suppress(OSError):  # of a cache that may only be read
        os.utime(folder / ENTRY)
    loaded.notes[:] = [*entry.notes, f"its weights were quantized on {entry.created[:10]} and come from the cache: "
                       "cache=False (--no-cache) quantizes them again"]  # fmt: skip
    return loaded


def keep(folder: Path, loaded: LoadedModel, backend: Backend) -> None:
    """Keep a model that was just loaded, for the next load; why it is not goes into its notes."""
    from polyquant.packed_weights.tensor_file import TensorWriter
    from polyquant.registry import repacked, restored

    if loaded.settled is None or loaded.request is None or repacked.left_with_library(loaded.model, backend):
        return
    tensors = restored.stored_tensors(loaded.model)
    limit, nbytes = most_bytes(), sum(tensor.nbytes for tensor in tensors.values())
    if nbytes > limit:
        loaded.notes.append(f"not kept for the next load: {size(nbytes)} are more than {SIZE}, {size(limit)}")
        return

    def write(out: Path) -> None:
        with TensorWriter(out / WEIGHTS, tensors) as writer:
            _add_rest(writer, tensors)
        _describe(out, loaded, backend, writer.sha256)

    try:
        once(folder, write)
        make_room(limit, but=folder)
    except (OSError, SaveError) as error:
        loaded.notes.append(f"not kept for the next load: {error}")


def make(
    folder: Path, backend: Backend, request: LoadRequest, settled: Settled,
    load: Callable[[Backend, LoadRequest, Settled], LoadedModel],
) -> LoadedModel:  # fmt: skip
    """A model that is not to be in memory as a whole, from its entry, which is made: each layer is written when packed.

    Raises PlacementError where there is no room for the entry, SaveError where it cannot be written, ConfigError where
    the library multiplies with some of its layers, and what `load` does.
    """
    from polyquant.packed_weights.tensor_file import TensorWriter
    from polyquant.registry import repacked, restored

    require_space(sum(plan.stored_bytes for plan in backend.plan_layers(settled.weights, settled.options)))
    names = [f"{weight.name}.{part}" for weight in settled.weights for part in range(PARTS_OF_EACH)]

    def write(out: Path) -> None:
        with TensorWriter(out / WEIGHTS, names) as writer:
            with repacked.putting_away(writer):
                loaded = load(backend, request, settled)
                repacked.finish(loaded, backend)
            if repacked.left_with_library(loaded.model, backend):
                raise ConfigError(
                    f"offload='disk' reads layers in the packed layout, and {backend.name} multiplies with some "
                    f"itself: {'; '.join(loaded.notes)}; take other options, or more memory"
                )
            _add_rest(writer, restored.stored_tensors(loaded.model))
        _describe(out, loaded, backend, writer.sha256)

    try:
        once(folder, write)
    except SaveError as error:
        if isinstance(error.__cause__, BackendFailed):  # it was loading that failed, and not writing
            raise error.__cause__ from error
        raise SaveError(
            f"offload='disk' keeps the packed weights in the user's cache, where they could not be written: {error}. "
            "POLYQUANT_CACHE names another folder"
        ) from error
    make_room(most_bytes(), but=folder)
    made = restore(folder, backend, request, settled)
    if made is None:
        raise ModelError(f"{folder} was made and cannot be read: something else writes there; load the model again")
    made.notes.pop()  # that it comes from the cache
    return made


def _add_rest(writer: TensorWriter, tensors: Mapping[str, Any]) -> None:
    from polyquant.packed_weights.tensor_file import ordered

    for name in ordered(tensors):
        if name not in writer.names:
            writer.add(name, tensors[name])


def _describe(out: Path, loaded: LoadedModel, backend: Backend, digest: str) -> None:
    """Write what an entry has beside its tensors."""
    from polyquant.registry import restored

    assert loaded.settled is not None  # every load sets both
    assert loaded.request is not None
    stored = loaded.model.config.quantization_config
    entry = Entry(
        model=loaded.request.source.name,
        backend=backend.name,
        options=msgspec.to_builtins(loaded.settled.options),
        versions=_versions(backend),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        stored_bytes=(out / WEIGHTS).stat().st_size,
        sha256=digest,
        quantization_config=dict(stored) if isinstance(stored, Mapping) else stored.to_dict(),
        is_transformers=not isinstance(stored, Mapping),
        notes=tuple(loaded.notes),
    )
    (out / MODULES).write_bytes(msgspec.json.encode(restored.stored_modules(loaded.model)))
    (out / ENTRY).write_text(entry.to_json(), encoding="utf-8")


def _read(folder: Path, entry: Entry, request: LoadRequest, settled: Settled) -> LoadedModel:
    """The model of an entry, whose tensors are the file's pages. Raises ModelError, OSError."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    from polyquant.packed_weights import on_disk, step
    from polyquant.packed_weights.tensor_file import MappedFile
    from polyquant.registry import restored

    modules = msgspec.json.decode((folder / MODULES).read_bytes(), type=list[restored.StoredModule])
    file = MappedFile(folder / WEIGHTS)
    model = restored.restore(request, settled.dtype, modules, file.tensors())
    model.config.quantization_config = (
        AutoQuantizationConfig.from_dict(entry.quantization_config) if entry.is_transformers
        else entry.quantization_config
    )  # fmt: skip
    kernel = kernels.name()
    if request.on_disk:
        on_disk.read_by_block(model, file, request.on_disk)
        kernel += ", blocks from disk"
    elif step.attach(model):
        kernel += ", whole steps"
    return LoadedModel(model=model, config=settled.options, kernel=kernel)


def _prove(folder: Path, entry: Entry) -> None:
    """Raises ModelError where the file of weights is not the one that was written; once for as long as it stays."""
    from polyquant.packed_weights.tensor_file import digest_of

    status = (folder / WEIGHTS).stat()
    mark, seen = folder / PROVEN, f"{status.st_size} {status.st_mtime_ns}"
    with suppress(OSError):
        if mark.read_text(encoding="utf-8") == seen:
            return
    if digest_of(folder / WEIGHTS) != entry.sha256:
        raise ModelError(f"{folder / WEIGHTS} is damaged")
    with suppress(OSError):  # of a cache that may only be read: it is proven again
        mark.write_text(seen, encoding="utf-8")


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
