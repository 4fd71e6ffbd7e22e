"""How the packed layout and the formats of libraries go together, from shapes alone. Imports no torch."""

from __future__ import annotations

from math import gcd

from polyquant.types import PackedFormat

ROWS, COLUMNS, LEAST_GROUP = PackedFormat.ROWS, PackedFormat.COLUMNS, PackedFormat.LEAST_GROUP
"""Rows that are interleaved, what the stored columns are a multiple of, and the smallest group."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The number of each code of E2M1; the largest is that of E2M1_MOST."""
E2M1_MOST = 7


def group_of_runs(run: int, columns: int) -> int:
    """The largest group for scales of runs of `run` weights that go on from row to row; 0 where it is too small.

    bitsandbytes counts its blocks over the whole matrix: in rows of 96 columns a block of 64 ends in the next row.
    """
    group = run if columns % run == 0 else gcd(run, columns)
    return group if group % LEAST_GROUP == 0 else 0
