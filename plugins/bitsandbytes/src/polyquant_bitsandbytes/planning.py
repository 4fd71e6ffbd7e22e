"""Bytes of bitsandbytes' layers from shapes alone; formats as in bitsandbytes.functional.quantize_4bit."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

from polyquant.plugin import BackendOptions, LayerPlan, PackedFormat, WeightInfo, group_of_runs, plan_linears

from polyquant_bitsandbytes.options import BLOCK, BitsAndBytesOptions

NESTED_BLOCK = 256  # scales a nested scale
CODE_BYTES, NESTED_CODE_BYTES, OFFSET_BYTES = 16 * 4, 256 * 4, 4  # float32 code books and mean, one of each a tensor
STORAGE_BYTES = {"uint8": 1, "int8": 1, "float16": 2, "bfloat16": 2, "float32": 4}


def plan_layers(weights: Sequence[WeightInfo], config: BitsAndBytesOptions) -> list[LayerPlan]:
    return plan_linears(
        weights, config, config.scheme, lambda weight: quantized_bytes(weight.as_linear, config), takes=is_quantized,
        packed=lambda weight: packed_format(weight.as_linear, config),
    )  # fmt: skip


def packed_format(shape: tuple[int, ...], config: BitsAndBytesOptions) -> PackedFormat | None:
    """4 bit: a code book's entries in blocks that are counted over the whole matrix. 8 bit: a scale for each row."""
    if config.bits == 8:
        return PackedFormat(kind="int8", group_size=-1, scale_dtype="float32")
    group = group_of_runs(BLOCK, shape[1])
    return PackedFormat(kind="codebook4", group_size=group, scale_dtype="float32") if group else None


def is_quantized(weight: WeightInfo, config: BackendOptions) -> bool:
    """transformers replaces nn.Linear and Conv1D modules; fused experts and embeddings are neither."""
    return weight.module in ("Linear", "Conv1D") and len(weight.shape) == 2 and not config.skips(weight)


def quantized_bytes(shape: tuple[int, ...], config: BitsAndBytesOptions) -> int:
    """Packed weight with absmax, code book and, with double quantization, the nested state.

    shape: (out_features, in_features).
    """
    if config.bits == 8:
        return prod(shape) + 4 * shape[0]
    blocks, storage = ceil(prod(shape) / BLOCK), STORAGE_BYTES[config.quant_storage or "uint8"]
    packed = ceil(ceil(prod(shape) / 2) / storage) * storage + CODE_BYTES
    if not config.double_quant:
        return packed + 4 * blocks
    return packed + blocks + 4 * ceil(blocks / NESTED_BLOCK) + NESTED_CODE_BYTES + OFFSET_BYTES
