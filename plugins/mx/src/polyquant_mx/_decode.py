"""Codes and scales of a layer to numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from polyquant.plugin.floats import codes_of_pairs, e2m1_numbers, e4m3_numbers, e8m0_numbers
from torch import Tensor

if TYPE_CHECKING:
    from polyquant_mx._modules import MxLinear

E4M3 = torch.float8_e4m3fn


def decoded(layer: MxLinear, start: int, end: int) -> Tensor:
    """Rows from `start`, which is even, to before `end`: float32 (rows, in_features)."""
    scheme, columns = layer.scheme, layer.in_features
    scales = factors(layer, start, end)
    if scheme.codes == "e2m1":
        numbers = e2m1_numbers(layer.qweight[start:end])
    elif scheme.codes == "int4":
        numbers = ((int4_codes(layer.qweight[start // 2 : (end + 1) // 2]) ^ 8).view(torch.int8) - 8).float()
    else:
        numbers, power = e4m3_numbers(layer.qweight[start:end].view(E4M3))
        scales = scales * power
    group = scheme.columns or columns
    if numbers.shape[1] == scales.shape[1] * group:
        numbers.unflatten(1, (-1, group)).mul_(scales[..., None])
    else:  # a last group that is short
        numbers.mul_(scales.repeat_interleave(group, 1)[:, : numbers.shape[1]])
    column_scales = layer.part("column_scales")
    numbers = numbers[:, :columns]
    return numbers if column_scales is None else numbers * column_scales.float()


def factors(layer: MxLinear, start: int = 0, end: int | None = None) -> Tensor:
    """What the codes of some rows are multiplied with, float32 (rows, groups)."""
    scheme, rows, scales = layer.scheme, layer.out_features, layer.scales
    last = rows if end is None else end
    if scheme.rows != 1:
        number = torch.arange(start, last, device=scales.device)
        own = scales[number // scheme.rows if scheme.rows else number * len(scales) // rows]
    else:
        own = scales[start:last]
    numbers = e8m0_numbers(own) if scheme.scales == "e8m0" else own.float()
    each = outer_of_rows(layer, start, last)
    if each is None:
        return numbers
    return numbers / each if scheme.outer == "divides" else numbers * each


def outer_of_rows(layer: MxLinear, start: int, end: int) -> Tensor | None:
    """What the scales of some rows are multiplied with or divided by, float32 (rows, 1); None: nothing.

    Experts whose gate and up were scaled apart have one for each.
    """
    outer = layer.part("outer_scale")
    if outer is None:
        return None
    number = torch.arange(start, end, device=outer.device)
    return outer.float()[number * len(outer) // layer.out_features, None]


def int4_codes(pairs: Tensor) -> Tensor:
    """Two rows in each row of bytes, the first in the low four bits: uint8 (n, columns) to uint8 (2 n, columns)."""
    return torch.stack([pairs & 15, pairs >> 4], 1).flatten(0, 1)


def wide_codes(layer: MxLinear) -> Tensor:
    """The codes of a layer one by one, without padding: uint8 (out_features, in_features), or float8_e4m3fn."""
    qweight = layer.qweight.detach()
    if layer.scheme.codes == "e4m3":
        return qweight.view(E4M3)
    codes = codes_of_pairs(qweight) if layer.scheme.codes == "e2m1" else int4_codes(qweight)
    return codes[: layer.out_features, : layer.in_features]


def rotated(numbers: Tensor, rotation: Tensor) -> Tensor:
    """numbers (..., columns), each block of as many columns as `rotation` has rows multiplied with it."""
    return (numbers.unflatten(-1, (-1, len(rotation))) @ rotation).flatten(-2)
