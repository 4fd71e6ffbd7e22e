"""What a packed weight's layout is, and how many bytes it takes: from options and shapes alone. Imports no torch."""

from __future__ import annotations

from math import ceil, gcd, lcm
from typing import Literal

from polyquant.types import DTYPE_BYTES, Record

Kind = Literal["affine4", "codebook4", "int8"]
"""affine4: codes from 0 to 15, scale * (code - zero) or scale * code + minimum. codebook4: scale * table[code].
int8: as affine4, with signed codes of 8 bits."""
Offsets = Literal["none", "zeros", "minima"]
"""Of the groups. none: one zero point for all. zeros: an int8 zero point each. minima: a float32 minimum each."""
ROWS, COLUMNS, LEAST_GROUP = 8, 32, 16
"""Rows that are interleaved, what columns are a multiple of, and the smallest group."""
TABLE_BYTES = 16 * 4


class PackedFormat(Record, frozen=True):
    """The layout of the weights of one layer."""

    kind: Kind
    group_size: int  # columns that share a scale; -1: all of them
    scale_dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    offsets: Offsets = "none"
    ordered: bool = False  # whether columns are sorted by their groups: act-order

    def padded(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The rows and columns that are stored, of a weight (out_features, in_features)."""
        rows, columns = shape
        whole = COLUMNS if self.group_size == -1 else lcm(COLUMNS, self.group_size)
        return ROWS * ceil(rows / ROWS), whole * ceil(columns / whole)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a weight (out_features, in_features) with scales, offsets, table and order."""
        rows, columns = self.padded(shape)
        groups = rows * (columns // self.group_of(columns))
        each = DTYPE_BYTES[self.scale_dtype] + {"none": 0, "zeros": 1, "minima": 4}[self.offsets]
        codes = rows * columns if self.kind == "int8" else rows * columns // 2
        table = TABLE_BYTES if self.kind == "codebook4" else 0
        return codes + groups * each + table + (4 * columns if self.ordered else 0)

    def group_of(self, columns: int) -> int:
        """Columns that share a scale, of so many that are stored."""
        return columns if self.group_size == -1 else self.group_size


def group_of_runs(run: int, columns: int) -> int:
    """The largest group for scales of runs of `run` weights that go on from row to row; 0 where it is too small.

    bitsandbytes counts its blocks over the whole matrix: in rows of 96 columns a block of 64 ends in the next row.
    """
    group = run if columns % run == 0 else gcd(run, columns)
    return group if group % LEAST_GROUP == 0 else 0
