"""One layout for the packed weights of every format, which one set of kernels multiplies with. Imports torch.

A weight (out_features, in_features) lies with eight rows interleaved: a product needs no sums across a register.

    codes   int32 (rows / 8, columns / 8, 8), lanes of eight 4-bit codes of a row; of 8 bits (rows / 8, columns / 4, 8)
    scales  (rows / 8, columns / group, 8), float32, float16, bfloat16, or float8_e4m3fn as NVFP4 has them
    zeros   int8, or minima float32, like scales; or neither, and one zero point for all
    table   float32 (16), of a code book
    order   int32 (columns), where columns are sorted by their groups: the input that each multiplies
    outer_scales, outer_minima  float16 (rows / 8, columns / outer group, 8), by which scales and minima are multiplied
            where these are int8: what formats call nested, double or super-block scales
    column_scales  float32 (columns), in the order of the inputs: what each is multiplied by first
    row_scales  float32 (rows / 8, 1, 8), by which scales of float8_e4m3fn are multiplied, or divided: one of a tensor,
            repeated, since layers of several matrices have several

In a lane of 4-bit codes, code t lies at bit SHIFTS[t]: the even nibbles are codes 0 to 3, the odd ones 4 to 7. Rows
are padded to a multiple of 8, columns to one of 32 and of the group; groups that do not divide the columns are stored
in parts that do, with the same scale each, where nothing has to be padded then. What is stored is what is multiplied
with, so that files can be mapped. The same is said to C in core/kernels/src/polyquant_kernels.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional

from polyquant.errors import ModelError
from polyquant.packed_weights.bands import in_bands
from polyquant.packed_weights.format import LEAST_GROUP, ROWS
from polyquant.types import PackedFormat

SHIFTS = (0, 8, 16, 24, 4, 12, 20, 28)
E4M3 = torch.float8_e4m3fn
WIDE = {"int8": torch.int8, "float8": E4M3}
"""Kinds with codes of 8 bits, and these as torch has them."""
PARTS = (
    "codes", "scales", "zeros", "minima", "table", "order", "column_scales", "outer_scales", "outer_minima",
    "row_scales",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedWeight:
    """The weight of a layer, packed; see the module."""

    shape: tuple[int, int]  # out_features, in_features, without padding
    format: PackedFormat
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    minima: Tensor | None = None
    table: Tensor | None = None
    order: Tensor | None = None
    column_scales: Tensor | None = None
    outer_scales: Tensor | None = None
    outer_minima: Tensor | None = None
    row_scales: Tensor | None = None
    zero: float = 0.0  # the zero point of every group where there are neither zeros nor minima

    @property
    def out_features(self) -> int:
        """Its rows, without padding."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Its columns, without padding."""
        return self.shape[1]

    @property
    def parts(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {name: tensor for name in PARTS if (tensor := getattr(self, name)) is not None}

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns as they are stored."""
        return self.format.padded(self.shape)

    @property
    def group(self) -> int:
        """Columns that share a scale as they are stored: of groups that do not divide them a part."""
        return self.format.fitted(self.in_features).group_of(self.padded[1])

    def decode(self, start: int = 0, end: int | None = None) -> Tensor:
        """Rows from `start`, a multiple of 8, to before `end`, as numbers: float32 (rows, in_features)."""
        last = self.shape[0] if end is None else min(end, self.shape[0])
        blocks = slice(start // ROWS, -(-last // ROWS))
        return self._numbers(lambda part: part[blocks].transpose(1, 2).flatten(0, 1))[: last - start]

    def decode_rows(self, index: Tensor) -> Tensor:
        """Some rows by their numbers, which are in range: float32 (numbers, in_features)."""
        return self._numbers(lambda part: part[index // ROWS, :, index % ROWS])

    def _numbers(self, rows_of: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows as numbers. rows_of: a part -> those rows of it, (rows, lanes or groups)."""
        columns = self.padded[1]
        codes = self._unpacked(rows_of(self.codes)).view(-1, columns // self.group, self.group)

        def of_groups(tensor: Tensor, outer: Tensor | None = None) -> Tensor:
            values = floats(tensor, rows_of)
            if outer is not None:
                values = values * rows_of(outer).float().repeat_interleave(self.format.outer_group // self.group, -1)
            return values[..., None]

        scales = of_groups(self.scales, self.outer_scales)
        if self.row_scales is not None:
            scales = self.with_rows(scales, rows_of(self.row_scales)[..., None])
        if self.table is not None:
            values = scales * self.table[codes.int()]
        elif self.minima is not None:  # one rounding, as a fused multiplication and addition has
            minima = of_groups(self.minima, self.outer_minima)
            values = (scales.double() * codes + minima.double()).float()
        else:
            zero = self.zero if self.zeros is None else of_groups(self.zeros)  # of float8 none
            values = scales * (codes.float() - zero)
        return self.by_inputs(values.reshape(-1, columns))

    def with_rows(self, scales: Tensor, of_rows: Tensor) -> Tensor:
        """Scales of 8 bits times those of their rows, or divided by them. Both float32, and of shapes that fit."""
        return scales / of_rows if self.format.row_scales == "divide" else scales * of_rows

    def by_inputs(self, values: Tensor) -> Tensor:
        """Decoded columns, as they are stored, by the inputs: in their order, times their scales, without padding."""
        values = self.in_order(values)
        return values if self.column_scales is None else values * self.column_scales[: self.shape[1]]

    def in_order(self, values: Tensor) -> Tensor:
        """Stored columns in the order of the inputs, without padding."""
        if self.order is None:
            return values[:, : self.shape[1]]
        back = torch.empty_like(values)
        back[:, self.order.long()] = values
        return back[:, : self.shape[1]]

    def _unpacked(self, lanes: Tensor) -> Tensor:
        """Codes of rows of lanes, (rows, columns)."""
        columns = self.padded[1]
        if self.format.kind in WIDE:
            return lanes.contiguous().view(WIDE[self.format.kind]).reshape(-1, columns)
        shifts = torch.tensor(SHIFTS, dtype=torch.int32, device=lanes.device)
        return ((lanes[..., None] >> shifts) & 15).to(torch.uint8).reshape(-1, columns)


def pack_weight(
    codes: Tensor,
    scales: Tensor,
    group_size: int = -1,
    *,
    zeros: Tensor | None = None,
    minima: Tensor | None = None,
    table: Tensor | None = None,
    zero: float = 0.0,
    groups_of_columns: Tensor | None = None,
    column_scales: Tensor | None = None,
    outer_scales: Tensor | None = None,
    outer_minima: Tensor | None = None,
    row_scales: Tensor | None = None,
    rows_divide: bool = False,
) -> PackedWeight:
    """A weight from what its format stores, nothing rounded.

    codes: (out_features, in_features), uint8 from 0 to 15, or int8 or float8_e4m3fn. scales: (out_features, groups) in
    a floating point; group_size: -1 is all columns. zeros: integers from -128 to 127, like scales; minima: like scales;
    zero: where there are neither. table: (16,), for codes that are entries of a code book.
    groups_of_columns: (in_features,), which group each column belongs to, where they do not follow each other.
    column_scales: (in_features,), by which each column is multiplied besides.
    outer_scales, outer_minima: float16 (out_features, outer groups), by which scales and minima of int8 are multiplied.
    row_scales: float32 (out_features, 1), by which scales of float8_e4m3fn are multiplied, with rows_divide divided.
    groups: those of all columns, or of all that are stored: with what fills up the last block.
    Raises ModelError where the parts do not fit each other, or floats of 8 bits are no numbers.
    """
    rows, columns = codes.shape
    order = None if groups_of_columns is None else _order(groups_of_columns, columns, group_size)
    wide = next((kind for kind, dtype in WIDE.items() if dtype == codes.dtype), "")
    for name, tensor in (("weights", codes), ("scales", scales)):
        if tensor.dtype == E4M3 and bool((tensor.view(torch.uint8) & 127 == 127).any()):
            raise ModelError(f"some of its {name} are NaN")
    layout = PackedFormat(
        kind="codebook4" if table is not None else wide or "affine4",  # type: ignore[arg-type]  # two of the kinds
        group_size=group_size,
        scale_dtype=str(scales.dtype).removeprefix("torch."),  # type: ignore[arg-type]  # as torch calls it
        offsets="zeros" if zeros is not None else "minima" if minima is not None else "none",
        ordered=order is not None,
        outer_group=0 if outer_scales is None else columns // outer_scales.shape[1],
        column_scales=column_scales is not None,
        row_scales="none" if row_scales is None else "divide" if rows_divide else "multiply",
    )
    padded_rows, padded_columns = layout.padded((rows, columns))
    group = layout.fitted(columns).group_of(padded_columns)
    if group_size not in (-1, group):
        scales, zeros, minima = (
            tensor if tensor is None else tensor.repeat_interleave(group_size // group, 1)[:, : columns // group]
            for tensor in (scales, zeros, minima)
        )
    groups = padded_columns // group
    if group % LEAST_GROUP or (order is not None and padded_columns != columns):
        raise ModelError(f"groups of {group_size} columns in {columns} have no place in the packed layout")
    for name, tensor in (("scales", scales), ("zeros", zeros), ("minima", minima)):
        if tensor is not None and tensor.shape not in ((rows, groups), (rows, ceil(columns / group))):
            raise ModelError(f"{name} are {tuple(tensor.shape)}, and {rows} rows of {groups} groups need as many")
    if layout.outer_group and (layout.outer_group % group or padded_columns != columns or columns % layout.outer_group):
        raise ModelError(f"outer groups of {layout.outer_group} columns have no place beside groups of {group}")
    if column_scales is not None and column_scales.shape != (columns,):
        raise ModelError(f"column_scales are {tuple(column_scales.shape)}, and there are {columns} columns")
    if row_scales is not None and (scales.dtype != E4M3 or row_scales.shape != (rows, 1)):
        raise ModelError(
            f"row_scales are {tuple(row_scales.shape)} beside scales of {scales.dtype}, and {rows} rows have one each"
        )
    if order is not None:
        codes = codes[:, order.long()]

    def of_groups(tensor: Tensor | None, dtype: torch.dtype, count: int = groups) -> Tensor | None:
        if tensor is None:
            return None
        bytes_of = tensor.view(torch.uint8) if dtype == E4M3 else tensor.to(dtype)
        whole = functional.pad(bytes_of, (0, count - tensor.shape[1], 0, padded_rows - rows))
        return whole.view(-1, ROWS, count).transpose(1, 2).contiguous().view(dtype)

    def lanes(some: Tensor) -> dict[str, Tensor]:
        whole = functional.pad(some, (0, padded_columns - columns, 0, -len(some) % ROWS)).contiguous()
        return {"lanes": _wide_lanes(whole) if wide else _lanes(whole)}

    bytes_of = codes.view(torch.int8) if wide else codes
    outer_groups = padded_columns // layout.outer_group if layout.outer_group else 0
    packed_scales = of_groups(scales, scales.dtype)
    assert packed_scales is not None
    return PackedWeight(
        shape=(rows, columns), format=layout, codes=in_bands(bytes_of, lanes, multiple=ROWS)["lanes"],
        scales=packed_scales, zeros=of_groups(zeros, torch.int8),
        minima=of_groups(minima, torch.int8 if layout.outer_group else torch.float32),
        outer_scales=of_groups(outer_scales, torch.float16, outer_groups),
        outer_minima=of_groups(outer_minima, torch.float16, outer_groups),
        row_scales=of_groups(row_scales, torch.float32, 1),
        table=None if table is None else table.detach().float().contiguous(),
        order=order, column_scales=None if column_scales is None else functional.pad(
            column_scales.detach().float(), (0, padded_columns - columns)).contiguous(),
        zero=0.0 if zeros is not None or minima is not None else zero,
    )  # fmt: skip


def _order(groups: Tensor, columns: int, group_size: int) -> Tensor:
    """Columns sorted by their groups, each of which must have `group_size` of them. Raises ModelError."""
    counts = torch.bincount(groups.long(), minlength=1) if bool((groups >= 0).all()) else groups.new_zeros(1)
    if len(groups) != columns or columns % group_size or not bool((counts == group_size).all()):
        raise ModelError(f"its columns do not come in whole groups of {group_size}")
    return torch.argsort(groups, stable=True).int()


def _lanes(codes: Tensor) -> Tensor:
    """4-bit codes, uint8 (rows, columns), as lanes."""
    rows, columns = codes.shape
    eight = codes.view(rows // ROWS, ROWS, columns // 8, 8)
    lanes = eight.new_zeros(eight.shape[:-1], dtype=torch.int32)
    for place, shift in enumerate(SHIFTS):
        lanes |= eight[..., place].to(torch.int32) << shift
    return lanes.transpose(1, 2).contiguous()


def _wide_lanes(codes: Tensor) -> Tensor:
    """8-bit codes, int8 (rows, columns), as lanes."""
    rows, columns = codes.shape
    return codes.view(torch.int32).view(rows // ROWS, ROWS, columns // 4).transpose(1, 2).contiguous()


def floats(part: Tensor, rows_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Some rows of a part, float32. Those of floats of 8 bits are taken as bytes: torch indexes these everywhere."""
    return rows_of(part.view(torch.uint8)).view(E4M3).float() if part.dtype == E4M3 else rows_of(part).float()


def same(one: PackedWeight, other: PackedWeight) -> bool:
    """Whether two weights are the same, bit for bit."""
    mine, theirs = one.parts, other.parts
    return (
        (one.shape, one.format, one.zero) == (other.shape, other.format, other.zero)
        and mine.keys() == theirs.keys()
        and all(torch.equal(_bits(mine[name]), _bits(theirs[name])) for name in mine)
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dim() else tensor
