"""Builds transformers' model around the tensors of a GGUF, one tensor at a time: nothing is held twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, BinaryIO

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
    with header.path.open("rb") as file:
        for name, placed in places.items():
            _put(model, name, as_loaded(file, placed, config).to(_device(name, request)), placed, dtype)
        if ROPE_FACTORS in header.tensors:
            _scale_rotary(model, dense_of(file, Placed(header.tensors[ROPE_FACTORS])), header)
    _modules.share_tied(model, tied, dtype)
    return model


def places_of(model: Any, header: Header) -> dict[str, Placed]:
    """The file's tensor for each parameter of `model`, dense or packed."""
    tied, shapes = checkpoints.tied_tensors(model), {}
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        packed = isinstance(owner, _modules.Packed) and parameter is owner.weight
        if name not in tied:
            shapes[name] = owner.logical_shape if packed else tuple(parameter.shape)
    return place(header, shapes)


def tokenizer_of(request: LoadRequest, header: Header) -> Any:
    """The file's own tokenizer; where it has none, the one in tokenizer files beside it."""
    source = request.source
    if "tokenizer.ggml.model" not in header.metadata:
        source = msgspec.structs.replace(source, gguf_file="")
    return checkpoints.load_tokenizer(source, trust_remote_code=request.trust_remote_code)


def is_kept(placed: Placed, config: GgufOptions) -> bool:
    """Whether a tensor stays as the file has it: blocks, and in a file that polyquant did not write every matrix."""
    return len(placed.shape) > 1 and (placed.entry.type.packed or config.type == "file")


def as_loaded(file: BinaryIO, placed: Placed, config: GgufOptions) -> Tensor:
    """A tensor of the file exactly as the model has it after loading."""
    if is_kept(placed, config):
        return weight_of(file, placed)
    return dense_of(file, placed).to(getattr(torch, resolved_dtype(config)))


def weight_of(file: BinaryIO, placed: Placed) -> Tensor:
    """A tensor as it is stored, in the model's row order: uint8 (rows, bytes a row) for blocks, else its numbers."""
    entry = placed.entry
    raw = torch.empty(entry.nbytes, dtype=torch.uint8)
    file.seek(entry.start)
    if file.readinto(memoryview(raw.numpy())) != entry.nbytes:  # type: ignore[attr-defined]
        raise ModelError(f"{entry.name} ends early: the file became shorter while it was read")
    if entry.type.packed:
        tensor = raw.view(*entry.shape[:-1], entry.type.row_bytes(entry.shape[-1]))
    else:
        tensor = raw.view(getattr(torch, FLOAT_DTYPES[entry.type.name])).view(entry.shape)
    return tensor if placed.heads == 0 else tensor[row_order(entry, placed.heads)]


def dense_of(file: BinaryIO, placed: Placed) -> Tensor:
    """A tensor's numbers in float32, as the model has them."""
    raw, entry = weight_of(file, placed), placed.entry
    if entry.type.packed:
        raw = dequantize(raw.view(-1, raw.shape[-1]), entry.type, torch.float32).view(entry.shape)
    return raw.float() - placed.offset if placed.offset else raw.float()


def row_order(entry: Entry, heads: int) -> Tensor:
    """Row i of transformers' q or k is row order[i] of llama.cpp's: the halves of each head are interleaved there."""
    return torch.arange(entry.shape[0]).view(heads, -1, 2).transpose(1, 2).reshape(-1)


def _check_types(weights: Sequence[WeightInfo], header: Header, places: dict[str, Placed], config: GgufOptions) -> None:
    """Raises ModelError where the tensors' types are not what the options stored in the file say."""
    promised = quantized_types(weights, config)
    for name, placed in places.items():
        found = placed.entry.type
        if promised.get(name, found) != found or (name not in promised and found.packed):
            raise ModelError(
                f"{header.path.name}: {placed.entry.name} has the type {found.name}, which contradicts the "
                "options stored in the file; write it again"
            )


def _put(model: nn.Module, name: str, tensor: Tensor, placed: Placed, dtype: torch.dtype) -> None:
    owner, _, short = name.rpartition(".")
    if len(placed.shape) == 1 or (tensor.dtype == dtype and not placed.entry.type.packed):
        setattr(model.get_submodule(owner), short, nn.Parameter(tensor))
        return
    try:
        _modules.replace(model, name, tensor, placed.entry.type, dtype)
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
