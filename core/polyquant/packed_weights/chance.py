"""Packed weights by chance: of any layout, for timing and for tests. Imports torch."""

from __future__ import annotations

from typing import Any

import torch

from polyquant.packed_weights.format import ROWS
from polyquant.packed_weights.weight import E4M3, WIDE, PackedWeight, pack_weight
from polyquant.types import PackedFormat

DEVIATION = 0.02
FLOAT8_SPREAD = 100.0  # of 448, the largest
OF_ROWS = ("codes", "scales", "zeros", "minima", "outer_scales", "outer_minima", "row_scales")


def random_parts(shape: tuple[int, int], layout: PackedFormat) -> dict[str, Any]:
    """What `pack_weight` takes for a weight (out_features, in_features) of the layout; torch's generator decides."""
    rows, columns = shape
    groups = -(-columns // layout.group_of(layout.padded(shape)[1]))
    wide, has_minima = layout.kind in WIDE, layout.offsets == "minima"
    low, end, dtype = (-128, 128, torch.int8) if wide else (0, 16, torch.uint8)
    codes = torch.randint(low, end, shape, dtype=dtype)
    if layout.kind == "float8":
        codes = torch.where(codes & 127 == 127, 0, codes).view(E4M3)  # no NaN
    parts: dict[str, Any] = {
        "codes": codes, "group_size": layout.group_size, "rows_divide": layout.row_scales == "divide",
        "zero": 0.0 if layout.kind == "float8" else 8.0,
        "scales": (torch.rand(rows, groups) * 0.1 + 0.01).to(getattr(torch, layout.scale_dtype)),
    }  # fmt: skip
    if layout.offsets == "zeros":
        parts["zeros"] = torch.randint(0, 16, (rows, groups))
    if has_minima:
        parts["minima"] = torch.randn(rows, groups)
    if layout.kind == "codebook4":
        parts["table"] = torch.randn(16)
    if layout.outer_group:
        outer = (rows, columns // layout.outer_group)
        parts |= {"outer_scales": (torch.rand(outer) * 0.01).half(),
                  "scales": torch.randint(-64, 64, (rows, groups), dtype=torch.int8)}  # fmt: skip
        if has_minima:
            parts |= {"outer_minima": (torch.rand(outer) * 0.01).half(),
                      "minima": torch.randint(-64, 64, (rows, groups), dtype=torch.int8)}  # fmt: skip
    if layout.row_scales != "none":
        parts["row_scales"] = torch.rand(rows, 1) + 0.1
    if layout.column_scales:
        parts["column_scales"] = torch.rand(columns) + 0.5
    if layout.ordered:
        size = layout.group_of(columns)
        parts["groups_of_columns"] = (torch.arange(columns) // size)[torch.randperm(columns)]
    return parts


def random_weight(shape: tuple[int, int], layout: PackedFormat) -> PackedWeight:
    """A weight of such parts whose numbers are about as large as those of a new layer."""
    parts = random_parts(shape, layout)
    if layout.kind == "float8":  # subnormal numbers, rare in rounded weights, take processors longer
        parts["codes"] = (FLOAT8_SPREAD * torch.randn(shape)).clamp(-448, 448).to(E4M3)
    some = pack_weight(**{**parts, **_first(parts, ROWS)})
    factor = DEVIATION / float(some.decode().std())
    if layout.row_scales != "none":  # scales of 8 bits would be nothing
        parts["row_scales"] *= 1 / factor if layout.row_scales == "divide" else factor
    else:
        for name in ("outer_scales", "outer_minima") if layout.outer_group else ("scales", "minima"):
            if name in parts:
                parts[name] *= factor
    return pack_weight(**parts)


def _first(parts: dict[str, Any], rows: int) -> dict[str, Any]:
    """The parts of the first rows."""
    return {name: parts[name][:rows] for name in OF_ROWS if name in parts}
