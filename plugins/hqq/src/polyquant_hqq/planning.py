"""Bytes of HQQ's layers from shapes alone, and which layers it can take. Format: hqq.core.bitpack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, prod
from typing import Literal

from polyquant.plugin import DTYPE_BYTES, LayerPlan, PackedFormat, WeightInfo, group_of_runs, plan_linears, unfit

from polyquant_hqq.options import HqqOptions

KINDS: Mapping[int, Literal["affine4", "int8"]] = {4: "affine4", 8: "int8"}
"""Bits -> what the codes are with kernel="packed"; fewer bits would take far more memory there."""


def plan_layers(weights: Sequence[WeightInfo], config: HqqOptions) -> list[LayerPlan]:
    """Raises ConfigError where the group size does not fit a layer."""
    return plan_linears(
        weights, config, config.scheme, lambda weight: quantized_bytes(weight, config),
        packed=lambda weight: packed_format(weight, config),
    )  # fmt: skip


def packed_format(weight: WeightInfo, config: HqqOptions) -> PackedFormat | None:
    """Zero points are no integers: each group has a minimum. None where groups lie otherwise than in rows."""
    if config.axis == 0 or config.bits not in KINDS:
        return None
    layout = PackedFormat(
        kind=KINDS[config.bits], group_size=config.group_size,
        scale_dtype=weight.dtype, offsets="minima",  # type: ignore[arg-type]  # the compute dtype, as hqq has them
    )  # fmt: skip
    columns = weight.shape[1]
    whole = group_of_runs(config.group_size, columns) == config.group_size and layout.padded(weight.shape)[1] == columns
    return layout if whole else None


def quantized_bytes(weight: WeightInfo, config: HqqOptions) -> int:
    """Packed weight with a scale and a zero point a group, both in the compute dtype."""
    groups = _groups(weight, config)
    return (
        prod(packed_shape(weight.shape, config)) * (4 if config.bits == 3 else 1)
        + 2 * groups * DTYPE_BYTES[weight.dtype]
    )


def packed_shape(shape: tuple[int, ...], config: HqqOptions) -> tuple[int, int]:
    """Shape of W_q: uint8, for 3 bit int32 with ten weights each. shape: (out_features, in_features)."""
    groups = prod(shape) // config.group_size
    rows, columns = (groups, config.group_size) if config.axis == 1 else (config.group_size, groups)
    return ceil(rows / 10) if config.bits == 3 else rows * config.bits // 8, columns


def _groups(weight: WeightInfo, config: HqqOptions) -> int:
    """Number of groups of a layer. Raises ConfigError where they do not come out even."""
    size, dimension = config.group_size, ("out_features", "in_features")[config.axis]
    length, groups = weight.shape[config.axis], prod(weight.shape) // size
    packed_together = 1 if config.bits == 3 or config.axis == 0 else 8 // config.bits
    if length % size == 0 and groups % packed_together == 0:
        return groups
    what = f"group_size {size} does not divide {dimension} {length}"
    if length % size == 0:
        what = f"{groups} groups of {size} cannot be packed by {packed_together}"
    other = [
        each
        for each in (8, 16, 32, 64, 128)
        if length % each == 0 and prod(weight.shape) // each % packed_together == 0
    ]
    raise unfit(weight, what, [f"group_size={max(other)}"] if other else [])
