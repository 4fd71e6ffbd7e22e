"""Layouts of other kernels, put into the ordinary ones without rounding: GPTQ's marlin, AWQ's gemv and gemv_fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from polyquant.errors import ModelError
from polyquant.plugin.layers import Part, require_parts
from polyquant.plugin.layouts import group_count
from polyquant.plugin.packing import in_awq_words, in_words, unpacked
from torch import Tensor

from polyquant_gptqmodel.options import GEMV, GEMV_FAST, MARLIN

TILE, TILES = 16, 4  # marlin: rows and columns of a tile, and tiles side by side that a warp reads at once
ZEROS = 8  # marlin has no zero points: they are in the middle of the range
FAST_ROWS, FAST_COLUMNS = 4, 64  # gemv_fast: rows side by side in a word of 16 bits, columns between two of their rows
PAIRED = (0, 2, 4, 6, 1, 3, 5, 7)  # of eight codes, the order in which kernels unpack them two by two


def ordinary(layout: str, linear: Any, tensors: Mapping[str, Tensor], group_size: int) -> dict[str, Tensor]:
    """qweight, qzeros and scales of a layer, as GPTQ (gptq_v2) or AWQ (gemm) usually store them; a bias as it is.

    Unchanged where `layout` is none of the three. Raises ModelError where tensors are missing or misshapen.
    """
    convert = {MARLIN: _of_marlin, GEMV: _of_gemv, GEMV_FAST: _of_gemv_fast}.get(layout)
    if convert is None:
        return dict(tensors)
    own = {name: tensor for name, tensor in tensors.items() if name != "bias"}
    bias = {name: tensor for name, tensor in tensors.items() if name == "bias"}
    shape = (linear.out_features, linear.in_features)
    return {**convert(shape, own, group_count(shape[1], group_size), group_size), **bias}


def _of_marlin(
    shape: tuple[int, int], tensors: Mapping[str, Tensor], groups: int, group_size: int
) -> dict[str, Tensor]:  # fmt: skip
    """B: int32 (in / 16, 2 * out), codes tile by tile; s: (groups, out), in the order of a warp's threads."""
    rows, columns = shape
    if rows % (TILE * TILES) or columns % TILE:
        raise ModelError(f"marlin has tiles of {TILE} x {TILE * TILES} weights, which do not divide {columns} x {rows}")
    parts = {"B": Part((columns // TILE, 2 * rows), "int32"), "s": Part((groups, rows), "float"),
             "workspace": Part(None, "int32", optional=True)}  # fmt: skip
    require_parts(shape, tensors, parts)
    tiles = _undone(unpacked(tensors["B"], 4), _marlin_order())
    codes = tiles.view(columns // TILE, rows // TILE, TILE, TILE).transpose(1, 2).reshape(columns, rows)
    scales = _undone(tensors["s"], _marlin_scales(single=groups == 1))
    zeros = torch.full((groups, rows), ZEROS, dtype=torch.uint8)
    return {"qweight": in_words(codes.T.contiguous(), 4).T.contiguous(), "qzeros": in_words(zeros, 4), "scales": scales}


def _marlin_order() -> Tensor:
    """Where in four tiles, one after the other and row by row, each of their 1024 codes comes from."""
    thread, four = torch.arange(32), torch.arange(TILES)
    rows = 2 * (thread % 4)[:, None] + torch.tensor([0, 1, 8, 9])
    places = TILE * rows[:, None, :] + (thread // 4)[:, None, None] + 8 * torch.arange(2)[:, None]
    whole = places[:, None] + TILE * TILE * four[:, None, None]  # (threads, tiles, halves, 4)
    return whole.reshape(-1, 8)[:, list(PAIRED)].flatten()


def _marlin_scales(*, single: bool) -> Tensor:
    """Where each of 64 scales side by side comes from, or each of 32 where a column has one for all of its rows."""
    if single:
        return (2 * torch.arange(4)[:, None] + torch.tensor([0, 1, 8, 9, 16, 17, 24, 25])).flatten()
    return torch.arange(64).view(8, 8).T.flatten()


def _undone(ordered: Tensor, order: Tensor) -> Tensor:
    """Numbers (rows, columns) of which each run of `len(order)` was put into an order, as they were."""
    return ordered.reshape(-1, len(order))[:, torch.argsort(order)].view(ordered.shape)


def _of_gemv(
    shape: tuple[int, int], tensors: Mapping[str, Tensor], groups: int, group_size: int
) -> dict[str, Tensor]:  # fmt: skip
    """qweight: int32 (out, in / 8), codes in turn; scales (out, width) and qzeros (out, width / 8), filled up."""
    rows, columns = shape
    width = _width(groups, group_size)
    parts = {"qweight": Part((rows, columns // 8), "int32"), "qzeros": Part((rows, width // 8), "int32"),
             "scales": Part((rows, width), "float")}  # fmt: skip
    require_parts(shape, tensors, parts)
    codes, zeros = (unpacked(tensors[name], 4) for name in ("qweight", "qzeros"))
    scales = tensors["scales"][:, :groups].T.contiguous()
    return {"qweight": in_awq_words(codes.T), "qzeros": in_awq_words(zeros[:, :groups].T), "scales": scales}


def _of_gemv_fast(
    shape: tuple[int, int], tensors: Mapping[str, Tensor], groups: int, group_size: int
) -> dict[str, Tensor]:  # fmt: skip
    """qweight: int16 (out / 4, in); scales and qzeros (width, out), filled up: qzeros are -scale * zero in float16."""
    rows, columns = shape
    if rows % FAST_ROWS or columns % FAST_COLUMNS:
        size = f"{FAST_ROWS} rows and {FAST_COLUMNS} columns"
        raise ModelError(f"gemv_fast has blocks of {size}, which do not divide {rows} x {columns}")
    width = _width(groups, group_size)
    parts = {"qweight": Part((rows // FAST_ROWS, columns), "int16"), "qzeros": Part((width, rows), "float"),
             "scales": Part((width, rows), "float")}  # fmt: skip
    require_parts(shape, tensors, parts)
    words = tensors["qweight"].to(torch.int32) & 0xFFFF
    four = torch.stack([(words >> (4 * each)) & 15 for each in range(FAST_ROWS)], -1).to(torch.uint8)
    blocks = four.view(rows // FAST_ROWS, columns // FAST_COLUMNS, FAST_ROWS, FAST_COLUMNS)  # 4 rows, 64 codes of each
    mixed = blocks.transpose(1, 2).reshape(rows, columns // 32, 32)
    codes = mixed[..., torch.argsort(_fast_order())].reshape(rows, columns)
    scales, lows = tensors["scales"][:groups], tensors["qzeros"][:groups]
    zeros = torch.where(scales == 0, 0, -lows.float() / scales.float()).round()
    if not bool((((-scales.float() * zeros).to(lows.dtype) == lows) & (zeros >= 0) & (zeros <= 15)).all()):
        raise ModelError("its qzeros are no zero points from 0 to 15 times its scales; the checkpoint is damaged")
    return {"qweight": in_awq_words(codes.T), "qzeros": in_awq_words(zeros.to(torch.uint8)),
            "scales": scales.contiguous()}  # fmt: skip


def _fast_order() -> Tensor:
    """Where each of 32 codes of a row comes from."""
    shuffled = torch.arange(32).view(4, 4, 2).transpose(0, 1).reshape(4, 4, 2)
    return shuffled.transpose(1, 2).flatten()


def _width(groups: int, group_size: int) -> int:
    """Groups that scales are filled up to: words of eight, and of them as many as 128 columns have groups."""
    multiple = 8 * max(1, 128 // group_size if group_size > 0 else 1)
    return -(-groups // multiple) * multiple
