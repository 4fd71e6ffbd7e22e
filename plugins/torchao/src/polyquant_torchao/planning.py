"""Bytes of torchao's tensors from shapes alone. Formats: torchao.quantization.quantize_.workflows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Literal

from polyquant.plugin import DTYPE_BYTES, LayerPlan, PackedFormat, WeightInfo, plan_linears, unfit

from polyquant_torchao.options import TorchAoOptions

KINDS: Mapping[str, Literal["affine4", "int8", "float8"]] = {
    "int8": "int8", "int4-in-int8": "affine4", "float8": "float8"
}  # fmt: skip
"""Scheme -> what its codes are with kernel="packed"."""


def plan_layers(weights: Sequence[WeightInfo], config: TorchAoOptions) -> list[LayerPlan]:
    """Raises ConfigError where the group size does not divide a layer."""
    return plan_linears(
        weights, config, config.scheme, lambda weight: quantized_bytes(weight, config),
        packed=lambda weight: packed_format(weight, config),
    )  # fmt: skip


def packed_format(weight: WeightInfo, config: TorchAoOptions) -> PackedFormat | None:
    """None: rounded activations."""
    kind = KINDS.get(config.scheme)
    if kind is None:
        return None
    made = weight.dtype if kind == "affine4" else "float32"  # by torchao, in which dtype it computes in
    scale = weight.parts.get("_weight_scale", made)
    return PackedFormat(kind=kind, group_size=config.group_size or -1, scale_dtype=scale)  # type: ignore[arg-type]


def quantized_bytes(weight: WeightInfo, config: TorchAoOptions) -> int:
    """One byte a weight; int8 has a float32 scale and an int8 zero point a row, float8 the scale, int4 both a group."""
    rows, columns = weight.shape
    if config.group_size is None:
        return prod(weight.shape) + rows * (4 if config.weights == "float8" else 5)
    if columns % config.group_size:
        divisors = [size for size in range(8, min(columns, 257)) if columns % size == 0]
        what = f"group_size {config.group_size} does not divide in_features {columns}"
        raise unfit(weight, what, [f"group_size={max(divisors)}"] if divisors else [])
    return prod(weight.shape) + prod(weight.shape) // config.group_size * (DTYPE_BYTES[weight.dtype] + 1)
