"""The tensors of a SINQ layer from its shape alone, and which layers it can take. Format: sinq.quantizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, prod
from typing import Literal

from polyquant.plugin import DTYPE_BYTES, LayerPlan, PackedFormat, WeightInfo, plan_linears, unfit

from polyquant_sinq.options import SinqOptions

STORED_NAMES = {
    "weight": "W_q", "columns": "meta.scale2",
    "scale": "meta.scale.x", "scale_step": "meta.scale.s", "scale_least": "meta.scale.m",
    "zero": "meta.zero.x", "zero_step": "meta.zero.s", "zero_least": "meta.zero.m",
}  # fmt: skip
"""A layer's tensors -> their names in checkpoints, which are sinq's own."""
IN_INT32 = {3: 10, 5: 6, 6: 5}
"""Bits -> codes in an int32, where they do not divide a byte."""
SCALE_ROWS = 32  # scales are rounded to 8 bits in columns of so many
KINDS: Mapping[int, Literal["affine4", "int8"]] = {4: "affine4", 5: "int8", 6: "int8", 8: "int8"}
"""Bits -> what the codes are with kernel="packed"; fewer bits would take far more memory there."""


def plan_layers(weights: Sequence[WeightInfo], config: SinqOptions) -> list[LayerPlan]:
    """Raises ConfigError where the group size does not fit a layer."""
    return plan_linears(
        weights, config, config.scheme, lambda weight: quantized_bytes(weight, config),
        packed=lambda _: packed_format(config),
    )  # fmt: skip


def packed_format(config: SinqOptions) -> PackedFormat | None:
    """Zero points are no integers: each group has a minimum.

    None: 2 and 3 bits, and columns that are scaled in tiles.
    """
    if config.bits not in KINDS or config.tiling == "2D":
        return None
    kind = KINDS[config.bits]
    return PackedFormat(kind=kind, group_size=config.group_size, offsets="minima", column_scales=True)


def quantized_bytes(weight: WeightInfo, config: SinqOptions) -> int:
    _require_fit(weight, config)
    return sum(prod(shape) * DTYPE_BYTES[dtype] for shape, dtype in layout(weight.shape, config).values())


def layout(shape: Sequence[int], config: SinqOptions) -> Mapping[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype) of a layer's tensors. shape: of the weight, (out_features, in_features)."""
    size, (rows, columns) = config.group_size, shape
    groups = rows * columns // size
    words = ceil(groups / IN_INT32[config.bits]) if config.bits in IN_INT32 else groups * config.bits // 8
    return {
        "weight": ((words, size), "int32" if config.bits in IN_INT32 else "uint8"),
        "scale": ((SCALE_ROWS, groups // SCALE_ROWS), "uint8"),
        "scale_step": ((1, groups // SCALE_ROWS), "float16"),
        "scale_least": ((1, groups // SCALE_ROWS), "float16"),
        "zero": ((groups, 1), "uint8"),
        "zero_step": ((1, 1), "float16"),
        "zero_least": ((1, 1), "float16"),
        "columns": ((1, columns) if config.tiling == "1D" else (groups // size, 1, size), "float16"),
    }


def _require_fit(weight: WeightInfo, config: SinqOptions) -> None:
    """sinq itself takes a smaller group where the size does not divide, and says so on standard output only."""
    size, (rows, columns) = config.group_size, weight.shape
    what = ""
    if columns % size:
        what = f"group_size {size} does not divide in_features {columns}"
    elif config.tiling == "2D" and rows % size:
        what = f"group_size {size} does not divide out_features {rows}, as tiling='2D' needs it to"
    elif (groups := rows * columns // size) % SCALE_ROWS:
        what = f"group_size {size} gives {groups} groups, and sinq rounds scales by {SCALE_ROWS}s,"
    if what:
        fits = [other for other in range(16, 257, 8) if _fits(weight.shape, other, config.tiling)]
        raise unfit(weight, what, [f"group_size={min(fits, key=lambda other: abs(other - size))}"] if fits else [])


def _fits(shape: Sequence[int], size: int, tiling: str) -> bool:
    rows, columns = shape
    square = tiling == "1D" or rows % size == 0
    return columns % size == 0 and square and (rows * columns // size) % SCALE_ROWS == 0
