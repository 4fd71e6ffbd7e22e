"""Builds transformers' model around the tensors of a GGUF, one tensor at a time: nothing is held twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from polyquant.errors import ModelError, PolyquantError
from polyquant.plugin import LoadRequest, WeightInfo, checkpoints, resolved_dtype
from polyquant.plugin.gguf import FLOAT_DTYPES, Entry, Header
from torch import Tensor, nn

from polyquant_gguf import _modules
from polyquant_gguf._decode import dequantize
from polyquant_gguf.names import ROPE_FACTORS, Placed, place, rules_of
from polyquant_gguf.options import GgufOptions
from polyquant_gguf.planning import quantized_types


def build(request: LoadRequest, header: Header, config: GgufOptions) -> Any:
    """The model, its tensors on their devices: matrices packed, the rest in the compute dtype.

    Raises ModelError where the file does not hold exactly the tensors of its architecture.
    """
    rules, file_name, dtype = rules_of(header), header.path.name, getattr(torch, resolved_dtype(config))
    try:
        model = checkpoints.empty_causal_lm(request, resolved_dtype(config))
    except PolyquantError:
        raise
    except Exception as error:
        raise ModelError(f"{file_name}: its metadata make no {rules.model_type} model: {error}") from error
    if model.config.model_type != rules.model_type:
        raise ModelError(f"{file_name}: transformers reads {header.architecture!r} as {model.config.model_type!r}")
    stated, frequencies = header.number("rope.dimension_count"), _rotary_frequencies(model)
    if stated and frequencies and stated != 2 * frequencies:
        raise ModelError(
            f"{file_name} rotates {stated} dimensions of each head, and transformers' {rules.model_type}, "
            f"which does not read that, {2 * frequencies}; load the original model instead"
        )
    tied, places = checkpoints.tied_tensors(model), places_of(model, header)
    if config.type != "file":
        _check_types(request.weights, header, places, config)
    for name, placed in places.items():
        _put(model, name, as_loaded(placed, config).to(_device(name, request)), placed, dtype)
    if factors := header.tensors.get(ROPE_FACTORS):
        _scale_rotary(model, dense_of(Placed((factors,), factors.shape)), header)
    _modules.share_tied(model, tied, dtype)
    return model


def places_of(model: Any, header: Header) -> dict[str, Placed]:
    """The file's tensors for each parameter of `model`, dense or packed."""
    held = _modules.held_tensors(model, checkpoints.tied_tensors(model))
    return place(header, {name: each.shape for name, each in held.items()})


def tokenizer_of(request: LoadRequest, header: Header) -> Any:
    """The file's own tokenizer; where it has none, the one in tokenizer files beside it."""
    source = request.source
    if "tokenizer.ggml.model" not in header.metadata:
        source = msgspec.structs.replace(source, gguf_file="")
    return checkpoints.load_tokenizer(source, trust_remote_code=request.trust_remote_code)


def is_kept(placed: Placed, config: GgufOptions) -> bool:
    """Whether a tensor stays as the file has it: blocks, and in a file that polyquant did not write every matrix."""
    as_in_file = config.type == "file" and not placed.is_stack  # experts without blocks are a plain tensor
    return placed.holds_blocks and (placed.type.packed or as_in_file)


def as_loaded(placed: Placed, config: GgufOptions) -> Tensor:
    """A tensor of the file exactly as the model has it after loading."""
    if is_kept(placed, config):
        return weight_of(placed)
    return dense_of(placed).to(getattr(torch, resolved_dtype(config)))


def weight_of(placed: Placed) -> Tensor:
    """A tensor as stored, in the model's row order: uint8 (..., rows, bytes a row) for blocks, else its numbers."""
    parts = [_stored(entry) for entry in placed.entries]
    if placed.heads:
        parts = [part[row_order(len(part), placed.heads)] for part in parts]
    if len(parts) > 1:
        parts = [torch.stack(parts, 2).flatten(1, 2) if placed.alternates else torch.cat(parts, 1)]
    if placed.type.packed:
        return parts[0]
    return parts[0].transpose(1, 2).contiguous() if placed.is_transposed else parts[0].view(placed.shape)


def dense_of(placed: Placed) -> Tensor:
    """A tensor's numbers in float32, as the model has them."""
    raw = weight_of(placed)
    if placed.type.packed:
        raw = dequantize(raw.view(-1, raw.shape[-1]), placed.type, torch.float32).view(*raw.shape[:-1], -1)
    return raw.float() - placed.offset if placed.offset else raw.float()


def _stored(entry: Entry) -> Tensor:
    """uint8 (..., rows, bytes a row) for blocks, else numbers of the entry's shape."""
    raw = torch.empty(entry.nbytes, dtype=torch.uint8)
    with entry.path.open("rb") as file:
        file.seek(entry.start)
        if file.readinto(memoryview(raw.numpy())) != entry.nbytes:
            raise ModelError(f"{entry.name} ends early: the file became shorter while it was read")
    if entry.type.packed:
        return raw.view(*entry.shape[:-1], entry.type.row_bytes(entry.shape[-1]))
    return raw.view(getattr(torch, FLOAT_DTYPES[entry.type.name])).view(entry.shape)


def row_order(rows: int, heads: int) -> Tensor:
    """Row i of transformers' q or k is row order[i] of llama.cpp's: the halves of each head are interleaved there."""
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)


def _check_types(weights: Sequence[WeightInfo], header: Header, places: dict[str, Placed], config: GgufOptions) -> None:
    """Raises ModelError where the tensors' types are not what the options stored in the file say."""
    promised = quantized_types(weights, config)
    for name, placed in places.items():
        found = placed.type
        if promised.get(name, found) != found or (name not in promised and found.packed):
            raise ModelError(
                f"{header.path.name}: {placed.entry.name} has the type {found.name}, which contradicts the "
                "options stored in the file; write it again"
            )


def _put(model: nn.Module, name: str, tensor: Tensor, placed: Placed, dtype: torch.dtype) -> None:
    owner, _, short = name.rpartition(".")
    if len(placed.shape) == 1 or (tensor.dtype == dtype and not placed.type.packed):
        setattr(model.get_submodule(owner), short, nn.Parameter(tensor))
        return
    if placed.is_stack:
        stack = _modules.experts_of(tensor, placed.type, transposed=placed.is_transposed)
        checkpoints.put(model, name, stack)
        return
    try:
        _modules.replace(model, name, tensor, placed.type, dtype)
    except TypeError as error:
        raise ModelError(f"{placed.entry.name}: {error}") from error


def _rotary_frequencies(model: Any) -> int:
    """Of each head; 0 where the model keeps several sets."""
    return len(getattr(getattr(model.model, "rotary_emb", None), "inv_freq", ()))


def _scale_rotary(model: Any, factors: Tensor, header: Header) -> None:
    """Llama 3's long-context scaling, which a GGUF holds as one divisor for each rotary frequency."""
    rotary = model.model.rotary_emb
    if factors.shape != rotary.inv_freq.shape or not bool((factors > 0).all()):
        raise ModelError(f"{header.path.name}: {ROPE_FACTORS} does not fit {len(rotary.inv_freq)} rotary frequencies")
    for buffer in (rotary.inv_freq, rotary.original_inv_freq):
        buffer.div_(factors)


def _device(name: str, request: LoadRequest) -> Any:
    """Where a tensor goes: the entry of the device map with the longest matching module name."""
    places = request.device_map
    matching = [module for module in places if not module or name == module or name.startswith(f"{module}.")]
    where = places[max(matching, key=len)] if matching else "cpu"
    return "cpu" if where == "disk" else where
