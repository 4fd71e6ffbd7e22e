"""Checkpoints that are quantized already: who reads them, and whether the options agree with what is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from polyquant.errors import CheckpointConflict, ModelError, PolyquantError, UnknownBackend
from polyquant.models import marks
from polyquant.options import BackendOptions
from polyquant.registry.catalogue import catalogue, readers_of
from polyquant.registry.query import Selection
from polyquant.registry.written import is_so, told, words_of
from polyquant.request import ModelSource
from polyquant.types import BackendInfo


def method_of(source: ModelSource) -> str:
    """The checkpoint's quant_method; 'gguf' for a GGUF file; empty for a dense checkpoint."""
    if source.gguf_file:
        return "gguf"
    stored = source.stored_quantization
    if not stored:
        return ""
    if stored.get("load_in_4bit") or stored.get("load_in_8bit"):
        return "bitsandbytes"
    method = stored.get("quant_method")
    if not method:
        raise ModelError(f"{source.name}: its quantization_config names no quant_method; it holds {', '.join(stored)}")
    return str(method)


def is_dense(source: ModelSource) -> bool:
    """Whether the files are to be quantized; of a packaged GGUF, the dense model in it is meant."""
    return source.packaged or not method_of(source)


def reader_of(method: str, installed: Selection) -> str:
    """Name of the installed backend that reads `method`; of several, the one called like it, else one that shares this
    environment.

    Raises UnknownBackend, naming the plugin package that does.
    """
    cards = [info for info in installed if method in info.capabilities.loads_prequantized]
    readers = [info.name for info in sorted(cards, key=lambda info: info.isolated is not None)]
    if readers:
        return method if method in readers else readers[0]
    if known_readers := readers_of(method):
        command = catalogue()[known_readers[0]].command
        raise UnknownBackend(f"the checkpoint is quantized with {method!r}; to read it, run: {command}")
    if kind := marks.foreign(method):
        raise UnknownBackend(
            f"the checkpoint is quantized with {kind.title} ({method!r}), which no polyquant backend reads; what reads "
            f"it: {kind.read_by}. Or take the dense model, and quantize that"
        )
    known = sorted({known for info in installed for known in info.capabilities.loads_prequantized})
    raise UnknownBackend(
        f"the checkpoint is quantized with {method!r}, which no polyquant backend reads; "
        f"installed backends read {', '.join(known) or 'none'}"
    )


def stored_options(source: ModelSource, info: BackendInfo, method: str) -> BackendOptions:
    """The options stored in a quantized checkpoint. Raises ModelError where the backend cannot read them."""
    try:
        gguf = {"quant_method": method, "gguf_file": str(source.path / source.gguf_file)}
        return info.options.from_stored(gguf if source.gguf_file else source.stored_quantization)
    except PolyquantError:
        raise
    except Exception as error:  # the plugin's reading of what somebody else wrote
        why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ModelError(f"{source.name}: {info.name} cannot read its quantization_config: {why}") from error


def reconcile(
    source: ModelSource, stored: BackendOptions, requested: BackendOptions, given: Mapping[str, object],
    info: BackendInfo,
) -> BackendOptions:  # fmt: skip
    """The stored options with the requested load-time ones applied.

    given: as the user wrote them. Raises CheckpointConflict, field by field, where they contradict what is stored.
    """
    applied: dict[str, Any] = {}
    words = {name: value for name, value in given.items() if name in words_of(info)}
    conflicts = [f"  {name}: requested {value!r}, stored {told(info, stored, name)}"
                 for name, value in words.items() if not is_so(info, stored, name, value)]  # fmt: skip
    for name in given:
        if name in words:
            continue
        wanted, has = getattr(requested, name), getattr(stored, name)
        if name in stored.load_time:
            applied[name] = wanted
        elif wanted != has:
            conflicts.append(f"  {name}: requested {wanted!r}, stored {has!r}")
    if conflicts:
        raise CheckpointConflict(
            f"{source.name} is quantized already, and not as asked:\n" + "\n".join(conflicts) + "\n"
            f"Leave these options out, or quantize the dense model; "
            f"only {', '.join(sorted(stored.load_time))} can be chosen now"
        )
    return msgspec.structs.replace(stored, **applied)
