"""Bytes of quanto's layers from shapes alone. Format: optimum.quanto.nn.qmodule, optimum.quanto.tensor.packed."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

from polyquant.memory.planned import DTYPE_BYTES, plan_dense
from polyquant.types import LayerPlan, WeightInfo

from polyquant_quanto.options import QuantoOptions

ACTIVATION_SCALE_BYTES = 2 * 4  # input and output scale, float32 scalars, unused but there


def plan_layers(weights: Sequence[WeightInfo], config: QuantoOptions) -> list[LayerPlan]:
    return [
        LayerPlan(
            name=weight.name, shape=weight.shape, role="linear",
            stored_bytes=quantized_bytes(weight.shape, config.weights, DTYPE_BYTES[weight.dtype]),
            bits=config.weight_bits, scheme=config.weights, quantized=True,
        )
        if is_quantized(weight, config)
        else plan_dense(weight, config)
        for weight in weights
    ]  # fmt: skip


def is_quantized(weight: WeightInfo, config: QuantoOptions) -> bool:
    """quanto replaces nn.Linear and what derives from it; Conv1D, fused experts and embeddings are neither."""
    module = weight.name.rpartition(".")[0]
    skipped = module in config.skip or (config.skip_defaults and not config.skip and weight.default_skip)
    return weight.role in ("linear", "head") and "Linear" in weight.module and not skipped and not weight.tied_to


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
