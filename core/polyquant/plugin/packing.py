"""Tensors of layers as codes and scales, and GPTQ's and AWQ's in polyquant's packed layout and back, without rounding.

GPTQ: words of qweight run down in_features, those of qzeros along out_features, lowest bits first. Its first version
stores zero points less one. AWQ: all words run along out_features, and of eight codes in a word those of even columns
come first. Sizes and bytes of the same tensors are in `layouts`. Imports torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyquant.errors import Misfit, ModelError
from polyquant.packed_weights.codes import WeightCodes
from polyquant.packed_weights.weight import PackedWeight, pack_weight
from polyquant.plugin.codes import packed_bits
from polyquant.plugin.floats import E2M1, E8M0_BIAS
from polyquant.plugin.layouts import packed_group
from polyquant.plugin.parts import MOST_EXPONENT

E4M3_CODES = 127  # that are positive numbers, with 0
LAST_BITS = 2**-22  # of a float32
HALVES = (torch.float16, torch.bfloat16)
"""What readers of GPTQ and AWQ have scales in."""
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


def in_words(codes: Tensor, bits: int) -> Tensor:
    """The twin of `unpacked`: uint8 codes (rows, columns) of 4 or 8 bits as int32 words along the last axis.

    Raises Misfit where words do not come out whole.
    """
    if codes.shape[-1] % (32 // bits):
        raise Misfit("size", f"{32 // bits} codes are a word, and {codes.shape[-1]} are no whole number of words")
    return packed_bits(codes.to(torch.uint8), bits).contiguous().view(torch.int32)


def in_awq_words(codes: Tensor) -> Tensor:
    """The twin of `unpacked_awq`: uint8 codes (rows, columns) below 16 as AWQ's int32 words along the last axis."""
    if codes.shape[-1] % 8:
        raise Misfit("size", f"8 codes are a word, and {codes.shape[-1]} are no whole number of words")
    nibbles = [AWQ_ORDER.index(place) for place in range(8)]
    return in_words(codes.unflatten(-1, (-1, 8))[..., nibbles].flatten(-2), 4)


def unpack_gptq(
    weight: WeightCodes, bits: int, group_size: int, *, sym: bool, ordered: bool, less_one: bool
) -> dict[str, Tensor]:
    """The twin of `pack_gptq`: qweight, qzeros, scales and g_idx. Raises Misfit for what GPTQ has no place for."""
    codes, zeros = _unsigned(weight, bits, group_size, sym=sym, least=int(less_one))
    weight = (weight if ordered else weight.in_order()).in_groups(group_size)
    in_turn = torch.arange(weight.shape[1], dtype=torch.int32) // weight.group_size
    return {
        "qweight": in_words(codes, bits).T.contiguous(),
        "qzeros": in_words(zeros.T - int(less_one), bits),
        "scales": weight.scales_as(*HALVES).T.contiguous(),
        "g_idx": in_turn if weight.groups is None else weight.groups,
    }


def unpack_awq(weight: WeightCodes, group_size: int, *, sym: bool) -> dict[str, Tensor]:
    """The twin of `pack_awq`: qweight, qzeros and scales. Raises Misfit for what AWQ has no place for."""
    codes, zeros = _unsigned(weight, 4, group_size, sym=sym)
    return {
        "qweight": in_awq_words(codes.T), "qzeros": in_awq_words(zeros.T),
        "scales": weight.in_order().in_groups(group_size).scales_as(*HALVES).T.contiguous(),
    }  # fmt: skip


def _unsigned(weight: WeightCodes, bits: int, group_size: int, *, sym: bool, least: int = 0) -> tuple[Tensor, Tensor]:
    """Codes (out_features, in_features) and zero points (out_features, groups) from 0 to below 2^bits.

    least: of the zero points that are held. Raises Misfit.
    """
    middle = 1 << (bits - 1)
    weight = weight.integers(bits).in_groups(group_size)
    if sym:
        weight.without_zero_points()
    lifted = middle - weight.middle  # of 8 bits both are signed in the packed layout
    zeros = weight.zero_points(least - lifted, 2 * middle - 1 - lifted) + lifted
    return (weight.codes if bits == 4 else unsigned(weight.codes)), zeros


def unsigned(codes: Tensor) -> Tensor:
    """int8 codes from -128 as uint8 from 0."""
    return codes.view(torch.uint8) ^ 128


def fp4_codes(weight: WeightCodes, size: int) -> Tensor:
    """Codes that are entries of E2M1's table, uint8 below 16, in order. Raises Misfit for others, and other groups.

    size: columns that share a scale.
    """
    if weight.kind != "code book" or weight.table is None or weight.table.tolist() != list(E2M1):
        raise Misfit("bits", f"its codes are {weight.kind} of {weight.bits} bits, and floats of 4 bits (E2M1) are held")
    return weight.in_order().in_groups(size).codes


def exponents(scales: Tensor) -> Tensor:
    """Scales that are powers of two as E8M0: uint8, 127 more than the exponent. Raises Misfit for others.

    0, of a block of zeros, becomes the smallest there is, 2^-127.
    """
    fraction, power = torch.frexp(scales.float())
    stored = torch.where(scales == 0, 0, power.int() - 1 + E8M0_BIAS)
    if not bool((((fraction == 0.5) | (scales == 0)) & (stored >= 0) & (stored <= MOST_EXPONENT)).all()):
        raise Misfit("scale dtype", "its scales are no powers of two, and those held (E8M0) are")
    return stored.to(torch.uint8)


def e4m3_scales(scales: Tensor, *, divides: bool) -> tuple[Tensor, Tensor]:
    """Scales as float8_e4m3fn, and a float32 (1,) for all by which they are multiplied, or with `divides` divided.

    Where the source divides and the target multiplies, or the other way round, float32 may round the last bit or two
    otherwise. Raises Misfit where there is no such factor.
    """
    wide = scales.float()
    kinds = wide.unique()
    largest, close = float(kinds.abs().max()), None
    for code in range(E4M3_CODES - 1, 0, -1) if largest > 0 else ():  # what the largest scale may be
        number = float(torch.tensor([code], dtype=torch.uint8).view(torch.float8_e4m3fn).float())
        first = torch.tensor(number / largest if divides else largest / number)
        for factor in (first, torch.nextafter(first, first * 2), torch.nextafter(first, first / 2)):
            again = _in_e4m3(kinds, factor, divides=divides).float()
            again = again / factor if divides else again * factor
            if torch.equal(again, kinds):
                return _in_e4m3(wide, factor, divides=divides), factor.reshape(1)
            if close is None and bool(((again - kinds).abs() <= LAST_BITS * kinds.abs()).all()):
                close = factor
    if close is None:
        raise Misfit("scale dtype", "its scales are no floats of 8 bits (E4M3) times one factor, and those held are")
    return _in_e4m3(wide, close, divides=divides), close.reshape(1)


def _in_e4m3(scales: Tensor, factor: Tensor, *, divides: bool) -> Tensor:
    return (scales * factor if divides else scales / factor).to(torch.float8_e4m3fn)


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
