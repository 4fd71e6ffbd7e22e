"""A weight out of the packed layout, for formats to store: codes, scales and zero points, row by row. Imports torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from polyquant.errors import Misfit
from polyquant.packed_weights.format import E2M1, E2M1_MOST
from polyquant.packed_weights.weight import E4M3, PackedWeight, floats
from polyquant.types import HeldWeight

MIDDLE = {4: 8, 8: 0}
"""Bits of integer codes -> the zero point in the middle of their range: codes of 8 bits are signed, as they lie."""
LEAST_ZERO, MOST_ZERO = -128, 127


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightCodes:
    """A weight (out_features, in_features) as formats store it: integers are scale * (code - zero), or with minima
    scale * code + minimum; entries of a code book scale * table[code]; floats scale * code."""

    name: str  # of the module
    shape: tuple[int, int]
    codes: Tensor  # (out_features, in_features): uint8 from 0 to 15, int8 for 8 bits, or float8_e4m3fn
    scales: Tensor  # (out_features, groups), floating point
    group_size: int  # columns that share a scale; in_features where all do
    zeros: Tensor | None = None  # int16, like scales: integers' zero points, where they say all
    minima: Tensor | None = None  # float32, like scales: where no zero points do
    table: Tensor | None = None  # float32 (16,)
    groups: Tensor | None = None  # int32 (in_features,): the group of each column, where they do not follow each other

    @property
    def bits(self) -> int:
        """Of a code: 4 or 8."""
        return 4 if self.codes.dtype == torch.uint8 else 8

    @property
    def middle(self) -> int:
        """The zero point in the middle of the codes' range."""
        return MIDDLE[self.bits]

    @property
    def kind(self) -> Literal["integers", "floats", "code book"]:
        """What the codes are."""
        if self.table is not None:
            return "code book"
        return "floats" if self.codes.is_floating_point() else "integers"

    @property
    def is_symmetric(self) -> bool:
        """Of integers, whether all zero points are in the middle of the range."""
        return self.zeros is not None and bool((self.zeros == self.middle).all())

    @property
    def held(self) -> HeldWeight:
        """What a format has to have a place for."""
        points: Literal["middle", "whole", "none"] = "middle"
        if self.kind == "integers" and not self.is_symmetric:
            points = "none" if self.zeros is None else "whole"
        return HeldWeight(
            name=self.name, shape=self.shape, kind=self.kind, bits=self.bits, group_size=self.group_size,
            scale_dtype=str(self.scales.dtype).removeprefix("torch."),  # type: ignore[arg-type]  # as torch calls it
            zero_points=points, ordered=self.groups is not None,
            table=() if self.table is None else tuple(self.table.tolist()),
        )  # fmt: skip

    def integers(self, bits: int) -> WeightCodes:
        """The weight itself. Raises Misfit where codes are no integers of so many bits."""
        if (self.kind, self.bits) != ("integers", bits):
            raise Misfit("bits", f"its codes are {self.kind} of {self.bits} bits, and integers of {bits} are held")
        return self

    def zero_points(self, least: int = LEAST_ZERO, most: int = MOST_ZERO) -> Tensor:
        """Integers' zero points, int16 (out_features, groups). Raises Misfit for minima, and for others than allowed.

        least, most: of the zero points, for codes as they lie here.
        """
        if self.zeros is None:
            raise Misfit("minima", "its minima are no whole multiples of its scales, and zero points are integers")
        if bool((self.zeros < least).any()) or bool((self.zeros > most).any()):
            low, high = int(self.zeros.min()), int(self.zeros.max())
            raise Misfit("zero points", f"they go from {low} to {high}, and {least} to {most} are held")
        return self.zeros

    def without_zero_points(self) -> WeightCodes:
        """The weight itself. Raises Misfit where any zero point is not in the middle of the range."""
        if not self.is_symmetric:
            raise Misfit("zero points", "its zero points are fitted, and those held are in the middle of the range")
        return self

    def in_order(self) -> WeightCodes:
        """The weight itself. Raises Misfit for act-order."""
        if self.groups is not None:
            raise Misfit("act-order", "its columns belong to groups in an order of their own, and those held follow")
        return self

    def in_groups(self, size: int) -> WeightCodes:
        """The same weight in groups of `size` columns, -1 for whole rows: scales are repeated, no code changes.

        Raises Misfit where groups would have to be joined, or split in two halves by act-order.
        """
        columns = self.shape[1]
        wanted = columns if size == -1 else size
        if wanted == self.group_size:
            return self
        if self.groups is not None or wanted > columns or self.group_size % wanted or columns % wanted:
            own = f"{self.group_size} of {columns} columns"
            raise Misfit("group size", f"its groups are of {own}, and groups of {size} are held")

        def spread(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            return tensor.repeat_interleave(self.group_size // wanted, 1)[:, : columns // wanted]

        scales = spread(self.scales)
        assert scales is not None
        return replace(self, group_size=wanted, scales=scales, zeros=spread(self.zeros), minima=spread(self.minima))

    def scales_as(self, *dtypes: torch.dtype) -> Tensor:
        """The scales in the first dtype that holds them all, else rounded to the first that has their size.

        Raises Misfit where they are too large or too small for each.
        """
        for dtype in dtypes:
            if torch.equal(self.scales.to(dtype).float(), self.scales.float()):
                return self.scales.to(dtype)
        for dtype in dtypes:
            if fits(self.scales, rounded := self.scales.to(dtype)):
                return rounded
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise Misfit("scale dtype", f"its scales, to {self.scales.abs().max():.3g}, have no place in {names}")


def fits(values: Tensor, rounded: Tensor) -> bool:
    """Whether numbers in another dtype are the same but for its ordinary rounding: none overflows, none is lost.

    Of numbers that are far smaller than the largest, less is asked: they stand for groups of next to nothing.
    """
    sizes = values.float().abs()
    allowed = torch.maximum(sizes, sizes.max() / 16) * torch.finfo(rounded.dtype).eps
    return bool(((rounded.float() - values.float()).abs() <= allowed).all())


def codes_of(name: str, weight: PackedWeight) -> WeightCodes:
    """A packed weight as formats store it, nothing rounded. Raises Misfit for what no format's layer has a place for.

    Scales that are themselves in two parts are multiplied out, in float32, exactly. Minima become zero points where
    each is one times its scale, in float32 or in the dtype of the scales, as formats that hold minima round them.
    name: of the module.
    """
    (rows, columns), layout = weight.shape, weight.format
    if weight.column_scales is not None:
        raise Misfit("column scales", "each of its columns has a scale besides, and scales of groups alone are held")
    group = layout.group_of(weight.padded[1])
    first = slice(0, ceil(columns / weight.group), group // weight.group)  # of the parts of each group

    def in_rows(part: Tensor) -> Tensor:
        return part.transpose(1, 2).flatten(0, 1)

    def of_groups(part: Tensor | None, outer: Tensor | None = None) -> Tensor | None:
        if part is None:
            return None
        values = floats(part, in_rows) if part.dtype == E4M3 else in_rows(part)
        if outer is not None:
            each = in_rows(outer).float()
            values = values.float() * each.repeat_interleave(layout.outer_group // weight.group, 1)
        return values[:rows, first].contiguous()

    scales = of_groups(weight.scales, weight.outer_scales)
    assert scales is not None
    if weight.row_scales is not None:
        scales = weight.with_rows(scales, in_rows(weight.row_scales)[:rows])
    codes = weight.in_order(weight._unpacked(weight.codes.transpose(1, 2).flatten(0, 1))[:rows]).contiguous()
    zeros, minima = of_groups(weight.zeros), of_groups(weight.minima, weight.outer_minima)
    table = weight.table
    if table is not None and table[E2M1_MOST] != 6 and torch.equal(table * 6 / table[E2M1_MOST], torch.tensor(E2M1)):
        table, scales = torch.tensor(E2M1), scales.float() * (table[E2M1_MOST] / 6)  # GGUF has E2M1 doubled
    found = WeightCodes(
        name=name, shape=weight.shape, codes=codes, scales=scales, group_size=min(group, columns),
        minima=minima, table=table, groups=_groups_of(weight),
    )  # fmt: skip
    if found.kind != "integers":
        return found
    if zeros is None and minima is None:
        zeros = torch.full_like(scales, weight.zero, dtype=torch.float32)
        if not float(weight.zero).is_integer():
            return replace(found, minima=-zeros * scales.float())
    if zeros is None and minima is not None:
        zeros = _zeros_of(minima, scales, found.middle)
    return found if zeros is None else replace(found, zeros=zeros.to(torch.int16), minima=None)


def _groups_of(weight: PackedWeight) -> Tensor | None:
    """The group of each column, where they are in another order than the columns."""
    if weight.order is None:
        return None
    in_turn = torch.arange(weight.shape[1], dtype=torch.int32) // weight.group
    groups = torch.empty_like(in_turn)
    groups[weight.order.long()] = in_turn
    return None if torch.equal(groups, in_turn) else groups


def _zeros_of(minima: Tensor, scales: Tensor, middle: int) -> Tensor | None:
    """The zero points that stand for minima; None where one stands for none."""
    wide = scales.double()
    zeros = torch.where(wide == 0, torch.full_like(wide, middle), (-minima.double() / wide).round())
    exact = -zeros * wide
    rounded = exact.to(torch.float16 if scales.dtype == torch.float32 else scales.dtype).double()
    same = (exact.float() == minima) | (rounded == minima.double())
    in_range = (zeros >= LEAST_ZERO) & (zeros <= MOST_ZERO)
    return zeros if bool((same & in_range).all()) else None
