"""The number formats, as fouroversix defines them: sizes of their blocks and the largest numbers. No torch."""

from __future__ import annotations

from collections.abc import Mapping

BLOCK: Mapping[str, int] = {"nvfp4": 16, "mxfp4": 32, "if4": 16, "nvint4": 16}
"""Weights of a row that share a scale."""
STATIC = ("static_6", "static_4")
ADAPTIVE = ("mse", "mae", "abs_max")
RULES: Mapping[str, tuple[str, ...]] = {
    "nvfp4": (*ADAPTIVE, *STATIC), "mxfp4": STATIC, "if4": ADAPTIVE, "nvint4": ("static_6",),
}  # fmt: skip
"""Format -> the rules it takes for choosing the scale of a block."""
SWIZZLED = ("nvfp4", "mxfp4")
"""Formats whose scales are in the order that Blackwell's matrix units read; others: row by row."""
ROWS, BLOCKS = 128, 4
"""Weights are padded with zeros to so many rows, and so many blocks in a row."""


def padded(shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """(rows, columns) as they are stored. shape: of the weight, (out_features, in_features)."""
    return up(shape[0], ROWS), up(shape[1], BLOCKS * BLOCK[dtype])


def largest(dtype: str, scale_rule: str) -> float:
    """What the tensor's greatest number becomes: the largest code times the largest scale; formats with e4m3 scales."""
    code = 4 if scale_rule == "static_4" else 7 if dtype == "nvint4" else 6
    scale = 448 if dtype == "if4" or scale_rule in STATIC else 256  # 4/6 needs room for a scale 1.5 times as large
    return code * scale


def up(length: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-length // step) * step
