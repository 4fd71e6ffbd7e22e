"""What is checked of a checkpoint before transformers reads it: bitsandbytes' kernels trust every tensor and number."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, isfinite, prod
from typing import Literal

import msgspec
import torch
from bitsandbytes.functional import get_4bit_type
from polyquant.errors import ModelError
from polyquant.plugin import LoadRequest, WeightInfo
from polyquant.plugin.parts import Expected, Part, require_layers
from torch import Tensor

from polyquant_bitsandbytes.options import BitsAndBytesOptions
from polyquant_bitsandbytes.planning import STORAGE_BYTES

STATE = "weight.quant_state.bitsandbytes__{}"
BLOCKS = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]


class State(msgspec.Struct):
    """The numbers of a 4-bit weight, JSON in a tensor of bytes."""

    quant_type: str
    blocksize: BLOCKS
    dtype: Literal["float32", "bfloat16", "float16"]
    shape: tuple[int, int]
    nested_blocksize: BLOCKS | None = None
    nested_dtype: Literal["float32"] | None = None
    nested_offset: float | None = None


def require_sound(request: LoadRequest, config: BitsAndBytesOptions) -> None:
    """Raises ModelError where a packed tensor does not fit its layer."""

    def expected(weight: WeightInfo, tensors: Mapping[str, Tensor]) -> Expected:
        shape = weight.as_linear
        if config.bits == 8:
            scales = Part((shape[0],), "float32", 0)
            return {"weight": (shape, "int8"), "SCB": scales, "weight_format": Part((), "uint8", 0, 0, optional=True)}
        return _four_bit(shape, config, tensors)

    require_layers(request, expected)


def _four_bit(shape: tuple[int, ...], config: BitsAndBytesOptions, tensors: Mapping[str, Tensor]) -> Expected:
    name, storage, kind = STATE.format(config.quant_type), config.quant_storage or "uint8", config.quant_type or ""
    state = _state(name, shape, config, tensors)
    blocks, code = ceil(prod(shape) / state.blocksize), tensors.get("weight.quant_map")
    table = get_4bit_type(kind, device="cpu")
    if code is not None and (code.shape != table.shape or not torch.allclose(code.float(), table, atol=1e-4)):
        raise ModelError(f"weight.quant_map is not the code book of {kind}, which the kernels have built in")
    parts = {
        "weight": Part((ceil(ceil(prod(shape) / 2) / STORAGE_BYTES[storage]), 1), storage),
        "weight.absmax": Part((blocks,), "float32", 0),
        "weight.quant_map": Part((16,), "float32"),
        name: Part(None, "uint8"),
    }
    if state.nested_blocksize is None:
        return parts
    return parts | {
        "weight.absmax": Part((blocks,), "uint8"),
        "weight.nested_absmax": Part((ceil(blocks / state.nested_blocksize),), "float32", 0),
        "weight.nested_quant_map": Part((256,), "float32", -1, 1),
    }


def _state(name: str, shape: tuple[int, ...], config: BitsAndBytesOptions, tensors: Mapping[str, Tensor]) -> State:
    stored = tensors.get(name)
    if stored is None or stored.dtype != torch.uint8 or stored.dim() != 1:
        there = ", ".join(sorted(tensors))
        raise ModelError(f"{name} should be there, in bytes; it has {there}")
    try:
        state = msgspec.json.decode(bytes(stored.tolist()), type=State)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{name} cannot be read: {error}") from error
    nested = (state.nested_blocksize, state.nested_dtype, state.nested_offset)
    if state.quant_type != config.quant_type or state.shape != shape:
        raise ModelError(
            f"{name} says {state.quant_type} {state.shape}, the model has {config.quant_type} {tuple(shape)}"
        )
    whole = all(value is not None for value in nested) if config.double_quant else not any(nested)
    if not whole or not isfinite(state.nested_offset or 0.0):
        raise ModelError(f"{name} says {nested} of double quantization, and double_quant is {config.double_quant}")
    return state
