"""Blocks to numbers in torch, on any device: the same operations in the same order as gguf.quants, so the same bits.

Each function takes blocks, uint8 (count, bytes a block), and returns float32 (count, weights a block).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from polyquant.plugin.gguf import BlockType
from torch import Tensor

from polyquant_gguf import _codebooks
from polyquant_gguf._bits import bits, f16, nibbles, split, table

FP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # e2m1, doubled


def dequantize(packed: Tensor, block: BlockType, dtype: torch.dtype) -> Tensor:
    """Rows of blocks, uint8 (rows, bytes a row), as numbers, (rows, in_features): computed in float32, then cast."""
    values = BLOCKS[block.name](packed.reshape(-1, block.nbytes))
    return values.reshape(packed.shape[0], -1).to(dtype)


def _q4_0(blocks: Tensor) -> Tensor:
    d, q = split(blocks, 2, 16)
    return _halves(f16(d), (q & 15).float().sub_(8), (q >> 4).float().sub_(8))


def _q4_1(blocks: Tensor) -> Tensor:
    d, m, q = split(blocks, 2, 2, 16)
    return _halves(f16(d), (q & 15).float(), (q >> 4).float()).add_(f16(m))


def _halves(d: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """d * [low, high] written in place: one pass over the output. Measured 1.5x faster than concatenating first."""
    out = torch.empty(low.shape[0], 2, low.shape[1], device=low.device)
    torch.mul(low, d, out=out[:, 0])
    torch.mul(high, d, out=out[:, 1])
    return out.view(low.shape[0], -1)


def _q5_0(blocks: Tensor) -> Tensor:
    d, high, low = split(blocks, 2, 4, 16)
    return five_bits(low, high).float().sub_(16).mul_(f16(d))


def _q5_1(blocks: Tensor) -> Tensor:
    d, m, high, low = split(blocks, 2, 2, 4, 16)
    return five_bits(low, high).float().mul_(f16(d)).add_(f16(m))


def five_bits(low: Tensor, high: Tensor) -> Tensor:
    """Codes of Q5_0 and Q5_1, uint8 (count, 32)."""
    fifth = bits(high, 1).flatten(1)  # bit i of the four bytes belongs to weight i
    return nibbles(low) | (fifth << 4)


def _q8_0(blocks: Tensor) -> Tensor:
    d, q = split(blocks, 2, 32)
    return q.view(torch.int8).float().mul_(f16(d))


def _q2_k(blocks: Tensor) -> Tensor:
    scales, q, d, dmin = split(blocks, 16, 64, 2, 2)
    scale = (f16(d) * (scales & 15).float())[..., None]
    low = (f16(dmin) * (scales >> 4).float())[..., None]
    return (scale * _groups(q, 2, 32, 16) - low).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    mask, q, scales, d = split(blocks, 32, 64, 12, 2)
    low = bits(scales[:, :8], 4).transpose(1, 2).flatten(1)  # low nibbles of 16 scales, then their top two bits
    high = bits(scales[:, 8:], 2).transpose(1, 2).flatten(1)
    scale = f16(d) * ((low | (high << 4)).float() - 32)
    borrow = 4 - 4 * _groups(mask, 1, 32, 16)  # the third bit counts where the mask is clear, and then downwards
    return (scale[..., None] * (_groups(q, 2, 32, 16) - borrow)).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    return _with_minima(*q4_k_parts(blocks))


def _q5_k(blocks: Tensor) -> Tensor:
    return _with_minima(*q5_k_parts(blocks))


def _q6_k(blocks: Tensor) -> Tensor:
    q, scales, d = q6_k_parts(blocks)
    return ((d * scales.float())[..., None] * q.float()).flatten(1)


def _with_minima(q: Tensor, scales: Tensor, minima: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
    return ((d * scales.float())[..., None] * q.float() - (dmin * minima.float())[..., None]).flatten(1)


def q4_k_parts(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes, uint8 (count, groups, 32); scales and minima of the groups, uint8 (count, groups); what these are
    multiplied with, float32 (count, 1). Minima are taken away."""
    d, dmin, scales, q = split(blocks, 2, 2, 12, 128)
    return _fields(q, 4, 32, 32), *_scales_and_minima(scales), f16(d), f16(dmin)


def q5_k_parts(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `q4_k_parts`."""
    d, dmin, scales, high, low = split(blocks, 2, 2, 12, 32, 128)
    q = _fields(low, 4, 32, 32) + 16 * _fields(high, 1, 32, 32)
    return q, *_scales_and_minima(scales), f16(d), f16(dmin)


def q6_k_parts(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, int8 (count, groups, 16); scales of the groups, int8 (count, groups); what these are multiplied with."""
    low, high, scales, d = split(blocks, 128, 64, 16, 2)
    q = (_fields(low, 4, 64, 16) + 16 * _fields(high, 2, 32, 16)).view(torch.int8) - 32
    return q, scales.view(torch.int8), f16(d)


def _groups(packed: Tensor, width_bits: int, run: int, size: int) -> Tensor:
    return _fields(packed, width_bits, run, size).float()


def _fields(packed: Tensor, width_bits: int, run: int, size: int) -> Tensor:
    """Fields of `width_bits`, uint8 (count, groups, size); each run of bytes holds its lowest fields first."""
    runs = packed.view(packed.shape[0], -1, 1, run)
    shifts = torch.arange(0, 8, width_bits, dtype=torch.uint8, device=packed.device).view(1, 1, -1, 1)
    return ((runs >> shifts) & (2**width_bits - 1)).view(packed.shape[0], -1, size)


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight 6-bit scales and minima from 12 bytes, uint8 (count, 8) of each: ggml's get_scale_min_k4."""
    one, two, both = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([one & 63, (both & 15) | ((one >> 2) & 48)], dim=1)
    minima = torch.cat([two & 63, (both >> 4) | ((two >> 2) & 48)], dim=1)
    return scales, minima


def _tq1_0(blocks: Tensor) -> Tensor:
    """Five ternary digits a byte, as a base-3 fraction: multiplying (modulo 256) moves a digit to the front."""
    long, short, rest, d = split(blocks, 32, 16, 4, 2)
    powers = table((1, 3, 9, 27, 81), torch.uint8, blocks.device).view(1, -1, 1)
    digits = [(part[:, None] * powers[:, :count]).flatten(1) for part, count in ((long, 5), (short, 5), (rest, 4))]
    return ((torch.cat(digits, dim=1).to(torch.int16) * 3 >> 8) - 1).float() * f16(d)


def _tq2_0(blocks: Tensor) -> Tensor:
    q, d = split(blocks, 64, 2)
    return (_groups(q, 2, 32, 256).flatten(1) - 1) * f16(d)


def _mxfp4(blocks: Tensor) -> Tensor:
    q, half = mxfp4_parts(blocks)
    return half * table(FP4_LEVELS, torch.float32, blocks.device)[q.int()]


def mxfp4_parts(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, places in FP4_LEVELS, uint8 (count, 32), and their scale, float32 (count, 1)."""
    exponent, q = blocks[:, :1].to(torch.int32), blocks[:, 1:]
    half = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)  # 2**(e - 128)
    return nibbles(q), half.view(torch.float32)


def _nvfp4(blocks: Tensor) -> Tensor:
    q, scale = nvfp4_parts(blocks)
    return (scale[..., None] * table(FP4_LEVELS, torch.float32, blocks.device)[q.int()]).flatten(1)


def nvfp4_parts(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, places in FP4_LEVELS, uint8 (count, 4, 16), and the scales of the sixteens, float32 (count, 4)."""
    scales, q = blocks[:, :4], blocks[:, 4:]
    exponent, mantissa = ((scales >> 3) & 15).float(), (scales & 7).float()
    raw = torch.where(exponent == 0, mantissa * 2**-9, (1 + mantissa / 8) * torch.exp2(exponent - 7))  # unsigned e4m3
    scale = torch.where((scales == 0) | (scales == 127), torch.zeros_like(raw), raw * 0.5)
    pairs = q.reshape(q.shape[0], 4, 8)
    return torch.cat([pairs & 15, pairs >> 4], dim=2), scale


BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    **_codebooks.BLOCKS,
}
