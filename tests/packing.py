"""Packed weights made by chance, and the numbers that they stand for."""

from __future__ import annotations

import torch
from polyquant.types import PackedFormat
from polyquant.packed_weights.linear import RepackedLinear
from polyquant.packed_weights.chance import random_parts
from polyquant.packed_weights.weight import PackedWeight, pack_weight
from torch import Tensor


def random_weight(shape: tuple[int, int], layout: PackedFormat) -> tuple[PackedWeight, Tensor, Tensor, Tensor]:
    """A weight of the layout, the same as float32 by the format's formula, its codes and its scales."""
    torch.manual_seed(0)
    columns = shape[1]
    group = layout.group_of(layout.padded(shape)[1])
    parts = random_parts(shape, layout)
    weight = pack_weight(**parts)
    codes, scales, table, minima = (parts.get(name) for name in ("codes", "scales", "table", "minima"))
    zeros, row_scales, column_scales = (parts.get(name) for name in ("zeros", "row_scales", "column_scales"))
    outer_scales, outer_minima = parts.get("outer_scales"), parts.get("outer_minima")

    def spread(values: Tensor) -> Tensor:
        return values.repeat_interleave(group, 1)[:, :columns]

    if row_scales is not None:
        scales = scales.float() / row_scales if layout.row_scales == "divide" else scales.float() * row_scales
    if outer_scales is not None:
        scales = scales * outer_scales.float().repeat_interleave(layout.outer_group // group, 1)
    if minima is not None and outer_minima is not None:
        minima = minima * outer_minima.float().repeat_interleave(layout.outer_group // group, 1)

    if table is not None:
        dense = spread(scales.float()) * table[codes.long()]
    elif layout.kind == "float8":
        dense = spread(scales.float()) * codes.float()
    elif minima is not None:
        dense = (spread(scales.double()) * codes.double() + spread(minima.double())).float()
    else:
        dense = spread(scales.float()) * (codes.float() - (8 if zeros is None else spread(zeros.float())))
    return weight, dense if column_scales is None else dense * column_scales, codes, scales


def packed_like(linear: torch.nn.Linear, group: int = 32) -> RepackedLinear:
    """A dense layer in 4 bits: rounded to the nearest, in groups with a minimum each."""
    weight = linear.weight.detach().float()
    groups = weight.view(len(weight), -1, group)
    low, high = groups.amin(2), groups.amax(2)
    scales = ((high - low) / 15).half()
    codes = ((groups - low[..., None]) / scales.float()[..., None]).round().clamp(0, 15)
    packed = pack_weight(codes.view_as(weight).to(torch.uint8), scales, group, minima=low)
    return RepackedLinear(packed, linear.bias, "int4", 4)


def pack_linears(model: torch.nn.Module, *, but: tuple[str, ...] = ("lm_head",)) -> None:
    """Pack every linear layer of a model in place, but those of these last names."""
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and name.rpartition(".")[2] not in but:
            model.set_submodule(name, packed_like(module))
