"""Tensors of layers as codes and scales, and GPTQ's and AWQ's in polyquant's packed layout; nothing is rounded.

GPTQ: words of qweight run down in_features, those of qzeros along out_features, lowest bits first. Its first version
stores zero points less one. AWQ: all words run along out_features, and of eight codes in a word those of even columns
come first. Sizes and bytes of the same tensors are in `layouts`. Imports torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyquant.errors import ModelError
from polyquant.packed_weights.weight import PackedWeight, pack_weight
from polyquant.plugin.layouts import packed_group

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Of eight columns in a word of AWQ's, the nibble that each one's code lies in."""


def scales_of_rows(scales: Tensor, rows: int, block_rows: int = 1) -> Tensor:
    """The scales of each row's groups, (rows, groups).

    scales: one for the matrix; one for each row; or (blocks of `block_rows` rows, groups), of which the last may be
    smaller.
    """
    if scales.numel() == 1:
        return scales.view(1, 1).expand(rows, 1)
    return scales.view(len(scales), -1).repeat_interleave(block_rows, 0)[:rows]


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The codes in int32 words along the last axis, lowest bits first: uint8 (rows, columns). bits: 4 or 8."""
    codes = words.contiguous().view(torch.uint8)
    return codes if bits == 8 else torch.stack([codes & 15, codes >> 4], -1).flatten(-2)


def unpacked_awq(words: Tensor) -> Tensor:
    """The 4-bit codes in AWQ's words along the last axis, in the order of columns: uint8 (rows, columns)."""
    return unpacked(words, 4).unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2)


def pack_gptq(
    qweight: Tensor, qzeros: Tensor | None, scales: Tensor, g_idx: Tensor | None, bits: int, group_size: int, *,
    sym: bool, ordered: bool = False, less_one: bool = False, wraps: bool = False,
) -> PackedWeight:  # fmt: skip
    """A layer of 4 or 8 bits, as `layouts.packed_format` plans it.

    qzeros: None where they are known to be in the middle of the range. less_one: zero points are stored so; wraps: 0
    then as the largest code, which else stands for the one beyond it: libraries differ. ordered: columns belong to
    groups in an order of their own, which g_idx says. Raises ModelError as `_packed`, and for reordered columns where
    they are not to be.
    """
    codes = unpacked(qweight.T, bits)
    ordered = ordered and packed_group(codes.shape[1], group_size) != -1
    if g_idx is not None and not ordered:
        size = codes.shape[1] if group_size == -1 else group_size
        if not torch.equal(g_idx.long(), torch.arange(len(g_idx), device=g_idx.device) // size):
            raise ModelError("its columns are reordered, and the checkpoint's config says that they are not (desc_act)")
    zeros = None if qzeros is None else unpacked(qzeros, bits).T.short() + less_one
    if zeros is not None and wraps:
        zeros = zeros & ((1 << bits) - 1)
    return _packed(codes, zeros, scales.T, bits, group_size, sym=sym, groups=g_idx if ordered else None)


def pack_awq(qweight: Tensor, qzeros: Tensor | None, scales: Tensor, group_size: int, *, sym: bool) -> PackedWeight:
    """A layer of 4 bits, of version gemm, as `layouts.packed_format` plans it.

    qzeros: None where they are known to be in the middle of the range. Raises ModelError as `_packed`.
    """
    zeros = None if qzeros is None else unpacked_awq(qzeros).T.short()
    return _packed(unpacked_awq(qweight).T, zeros, scales.T, 4, group_size, sym=sym)


def _packed(
    codes: Tensor, zeros: Tensor | None, scales: Tensor, bits: int, group_size: int, *, sym: bool,
    groups: Tensor | None = None,
) -> PackedWeight:  # fmt: skip
    """codes (out_features, in_features) below 2^bits; zeros and scales (out_features, groups).

    Raises ModelError for fitted zero points of a layer that is said to be symmetric, for one that no byte holds, and
    for columns that do not come in whole groups.
    """
    middle, group = 1 << (bits - 1), packed_group(codes.shape[1], group_size)
    if sym:
        if zeros is not None and not bool((zeros == middle).all()):
            raise ModelError("its zero points are fitted, and the checkpoint's config says that they are symmetric")
        zeros = None
    if bits == 8:
        codes, middle = (codes ^ 128).view(torch.int8), 0
        zeros = None if zeros is None else zeros - 128
        if zeros is not None and bool((zeros > 127).any()):
            raise ModelError("it has a zero point of 256, and its weights end at 255")
    return pack_weight(codes, scales, group, zeros=zeros, zero=middle, groups_of_columns=groups)
