"""Blocks in polyquant's packed layout, nothing rounded: the numbers are those of `_decode`, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from polyquant.errors import Misfit
from polyquant.plugin.gguf import TYPES
from polyquant.plugin.layers import PackedWeight, WeightCodes, fits, pack_weight
from polyquant.plugin.packing import exponents, fp4_codes
from torch import Tensor

from polyquant_gguf._bits import f16, nibbles, split, table
from polyquant_gguf._codebooks import IQ4_LEVELS
from polyquant_gguf._decode import FP4_LEVELS, five_bits, mxfp4_parts, nvfp4_parts, q4_k_parts, q5_k_parts, q6_k_parts
from polyquant_gguf._modules import PackedLinear
from polyquant_gguf.options import GgufOptions
from polyquant_gguf.planning import LAYOUTS


class Parts(NamedTuple):
    """What blocks hold. Codes in the order of the weights; scales and minima one for each group, block after block."""

    codes: Tensor
    scales: Tensor
    minima: Tensor | None = None
    zero: float = 0.0
    levels: tuple[float, ...] = ()  # that codes are places in
    outer_scales: Tensor | None = None  # of a block, by which its scales are multiplied
    outer_minima: Tensor | None = None


def pack(module: PackedLinear) -> PackedWeight:
    layout, (rows, columns) = LAYOUTS[module.block.name], module.logical_shape
    parts = PARTS[module.block.name](module.weight.detach().reshape(-1, module.block.nbytes))
    codes = parts.codes.reshape(rows, columns)
    return pack_weight(
        codes.to(torch.int8) if layout.kind == "int8" else codes,
        parts.scales.reshape(rows, -1).to(getattr(torch, layout.scale_dtype)),
        layout.group_size,
        minima=None if parts.minima is None else parts.minima.reshape(rows, -1),
        table=table(parts.levels, torch.float32, codes.device) if parts.levels else None,
        zero=parts.zero,
        outer_scales=None if parts.outer_scales is None else parts.outer_scales.reshape(rows, -1).half(),
        outer_minima=None if parts.outer_minima is None else parts.outer_minima.reshape(rows, -1).half(),
    )


def unpack(weight: WeightCodes, config: GgufOptions) -> dict[str, Tensor]:
    """Blocks of the layer's type: uint8 (rows, bytes a row)."""
    name = dict(config.layers).get(weight.name, config.type)
    if name not in BLOCKS:
        raise Misfit("bits", f"blocks of {name} are made of dense weights alone, and of codes {', '.join(BLOCKS)} are")
    block = TYPES[name]
    if weight.shape[1] % block.elements:
        raise Misfit("size", f"{name} blocks of {block.elements} weights do not divide its {weight.shape[1]} columns")
    fields = BLOCKS[name](weight.in_order().in_groups(block.elements))
    return {"weight": torch.cat([field.contiguous().view(torch.uint8) for field in fields], 2).flatten(1)}


def _q4_0_blocks(weight: WeightCodes) -> tuple[Tensor, ...]:
    return _d(weight.integers(4).without_zero_points().scales_as(torch.float16)), _halves(weight)


def _q4_1_blocks(weight: WeightCodes) -> tuple[Tensor, ...]:
    """Of zero points, the minimum is one times the scale, in float16."""
    scales, least = weight.integers(4).scales_as(torch.float16), weight.minima
    least = -weight.zero_points() * scales.float() if least is None else least
    if not fits(least, least.half()):
        raise Misfit("minima", f"its minima, to {least.abs().max():.3g}, have no place in float16")
    return _d(scales), _d(least.half()), _halves(weight)


def _q8_0_blocks(weight: WeightCodes) -> tuple[Tensor, ...]:
    scales = weight.integers(8).without_zero_points().scales_as(torch.float16)
    return _d(scales), weight.codes.unflatten(1, (-1, TYPES["Q8_0"].elements))


def _mxfp4_blocks(weight: WeightCodes) -> tuple[Tensor, ...]:
    fp4_codes(weight, TYPES["MXFP4"].elements)
    return exponents(weight.scales)[..., None], _halves(weight)


def _d(scales: Tensor) -> Tensor:
    """One number a block: (rows, blocks, 1)."""
    return scales[..., None]


def _halves(weight: WeightCodes) -> Tensor:
    """The twin of `nibbles`: of 32 codes of a block the first half in the low nibbles, (rows, blocks, 16)."""
    low, high = weight.codes.unflatten(1, (-1, 2, weight.group_size // 2)).unbind(2)
    return low | high << 4


BLOCKS: Mapping[str, Callable[[WeightCodes], tuple[Tensor, ...]]] = {
    "Q4_0": _q4_0_blocks, "Q4_1": _q4_1_blocks, "Q8_0": _q8_0_blocks, "MXFP4": _mxfp4_blocks,
}  # fmt: skip
"""Block type -> the fields of its blocks, in their order, each (rows, blocks, length)."""


def _q4_0(blocks: Tensor) -> Parts:
    d, q = split(blocks, 2, 16)
    return Parts(nibbles(q), f16(d), zero=8)


def _q4_1(blocks: Tensor) -> Parts:
    d, m, q = split(blocks, 2, 2, 16)
    return Parts(nibbles(q), f16(d), f16(m))


def _q5_0(blocks: Tensor) -> Parts:
    d, high, low = split(blocks, 2, 4, 16)
    return Parts(five_bits(low, high).view(torch.int8) - 16, f16(d))


def _q5_1(blocks: Tensor) -> Parts:
    d, m, high, low = split(blocks, 2, 2, 4, 16)
    return Parts(five_bits(low, high), f16(d), f16(m))


def _q8_0(blocks: Tensor) -> Parts:
    d, q = split(blocks, 2, 32)
    return Parts(q.view(torch.int8), f16(d))


def _q4_k(blocks: Tensor) -> Parts:
    q, scales, minima, d, dmin = q4_k_parts(blocks)
    return Parts(q, scales, minima, outer_scales=d, outer_minima=-dmin)


def _q5_k(blocks: Tensor) -> Parts:
    q, scales, minima, d, dmin = q5_k_parts(blocks)
    return Parts(q, scales, minima, outer_scales=d, outer_minima=-dmin)


def _q6_k(blocks: Tensor) -> Parts:
    q, scales, d = q6_k_parts(blocks)
    return Parts(q, scales, outer_scales=d)


def _iq4_nl(blocks: Tensor) -> Parts:
    d, q = split(blocks, 2, 16)
    return Parts(nibbles(q), f16(d), levels=IQ4_LEVELS)


def _mxfp4(blocks: Tensor) -> Parts:
    return Parts(*mxfp4_parts(blocks), levels=FP4_LEVELS)


def _nvfp4(blocks: Tensor) -> Parts:
    return Parts(*nvfp4_parts(blocks), levels=FP4_LEVELS)


PARTS: dict[str, Callable[[Tensor], Parts]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}
