"""Bytes of quanto's layers from shapes alone. Format: optimum.quanto.nn.qmodule, optimum.quanto.tensor.packed."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

from polyquant.plugin import DTYPE_BYTES, LayerPlan, WeightInfo, plan_linears

from polyquant_quanto.options import QuantoOptions

ACTIVATION_SCALE_BYTES = 2 * 4  # input and output scale, float32 scalars, unused but there


def plan_layers(weights: Sequence[WeightInfo], config: QuantoOptions) -> list[LayerPlan]:
    return plan_linears(
        weights,
        config,
        config.weights,
        lambda weight: quantized_bytes(weight.shape, config.weights, DTYPE_BYTES[weight.dtype]),
    )


def quantized_bytes(shape: tuple[int, ...], weights: str, dtype_bytes: int) -> int:
    """Packed weight with scales and shifts.

    shape: (out_features, in_features); dtype_bytes: of one scale or shift, in the compute dtype.
    """
    rows, columns = shape
    if weights in ("int8", "float8"):
        return prod(shape) + dtype_bytes * rows + ACTIVATION_SCALE_BYTES
    group = group_size(columns)
    if group:
        rows, columns = prod(shape) // group, group
    values_per_byte = 4 if weights == "int2" else 2
    return ceil(rows / values_per_byte) * columns + 2 * dtype_bytes * rows + ACTIVATION_SCALE_BYTES


def group_size(in_features: int) -> int | None:
    """The largest of 128, 96, 64 and 32 that divides in_features; None, one group a row, where none does."""
    return next((size for size in (128, 96, 64, 32) if in_features > 128 and in_features % size == 0), None)
