"""The IQ types: blocks that index fixed code books. The books are the gguf package's own, the unpacking is torch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from polyquant_gguf._bits import bits, f16, nibbles, split, table, words

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # ggml's kvalues_iq4nl
DELTA = 0.125  # IQ1S_DELTA, IQ1M_DELTA


@cache
def _points(name: str, device: torch.device) -> Tensor:
    """The code book of a type, float32 (points, 4 or 8)."""
    traits = quants._type_traits[GGMLQuantizationType[name]]
    traits.init_grid()
    return torch.from_numpy(traits.grid.reshape(traits.grid_shape)).to(device)


@cache
def _sign_bytes(device: torch.device) -> Tensor:
    """ggml's ksigns_iq2xs: seven bits to the eight signs they stand for."""
    return torch.tensor(list(quants.IQ2_XXS.ksigns), dtype=torch.uint8, device=device)


def _signs(packed: Tensor) -> Tensor:
    """A bit for each weight, set for minus: uint8 (..., n) to float32 (..., n, 8) of 1 and -1."""
    return 1 - 2 * bits(packed, 1).float()


def _indexed_signs(index: Tensor) -> Tensor:
    return _signs(_sign_bytes(index.device)[index])


def _shifted(values: Tensor, step: int, count: int, mask: int) -> Tensor:
    """Fields of int64 words: (n, words) to (n, words, count)."""
    return (values[..., None] >> torch.arange(0, step * count, step, device=values.device)) & mask


def _scale_nibbles(part: Tensor) -> Tensor:
    """Low then high nibble of each byte: float32 (count, 2 * bytes)."""
    return bits(part, 4).flatten(1).float()


def _weighted(scale: Tensor, points: Tensor, signs: Tensor) -> Tensor:
    """scale (count, groups); points and signs of all weights, in any grouping that keeps their order."""
    count, groups = scale.shape
    return (scale[..., None] * points.reshape(count, groups, -1) * signs.reshape(count, groups, -1)).flatten(1)


def _iq2_xxs(blocks: Tensor) -> Tensor:
    d, q = split(blocks, 2, 64)
    pairs = words(q, 4).view(blocks.shape[0], -1, 2)
    index, meta = pairs[..., 0], pairs[..., 1]
    scale = f16(d) * (0.5 + (meta >> 28).float()) * 0.25
    points = _points("IQ2_XXS", blocks.device)[_shifted(index, 8, 4, 255)]
    return _weighted(scale, points, _indexed_signs(_shifted(meta, 7, 4, 127)))


def _iq2_xs(blocks: Tensor) -> Tensor:
    d, q, scales = split(blocks, 2, 64, 8)
    index = words(q, 2)
    scale = f16(d) * (0.5 + _scale_nibbles(scales)) * 0.25
    return _weighted(scale, _points("IQ2_XS", blocks.device)[index & 511], _indexed_signs(index >> 9))


def _iq2_s(blocks: Tensor) -> Tensor:
    d, q, signs, high, scales = split(blocks, 2, 32, 32, 8, 8)
    index = q.long() | (bits(high, 2).flatten(1).long() << 8)
    scale = f16(d) * (0.5 + _scale_nibbles(scales)) * 0.25
    return _weighted(scale, _points("IQ2_S", blocks.device)[index], _signs(signs))


def _iq3_xxs(blocks: Tensor) -> Tensor:
    d, q, scales = split(blocks, 2, 64, 32)
    meta = words(scales, 4)
    scale = f16(d) * (0.5 + (meta >> 28).float()) * 0.5
    points = _points("IQ3_XXS", blocks.device)[q.long()]
    return _weighted(scale, points, _indexed_signs(_shifted(meta, 7, 4, 127)))


def _iq3_s(blocks: Tensor) -> Tensor:
    d, q, high, signs, scales = split(blocks, 2, 64, 8, 32, 4)
    index = q.long() | (bits(high, 1).flatten(1).long() << 8)
    scale = f16(d) * (1 + 2 * _scale_nibbles(scales))
    return _weighted(scale, _points("IQ3_S", blocks.device)[index], _signs(signs))


def _iq1_s(blocks: Tensor) -> Tensor:
    d, q, high = split(blocks, 2, 32, 16)
    meta = words(high, 2)
    scale = f16(d) * (2 * ((meta >> 12) & 7) + 1).float()
    index = q.long() | (_shifted(meta, 3, 4, 7).flatten(1) << 8)
    points = _points("IQ1_S", blocks.device)[index].view(*meta.shape, -1)
    return (scale[..., None] * (points + _delta(meta >> 15)[..., None])).flatten(1)


def _iq1_m(blocks: Tensor) -> Tensor:
    """The float16 scale lies in the top nibbles of the four scale words."""
    q, high, scales = split(blocks, 32, 16, 8)
    meta = words(scales, 2)
    bits16 = (_shifted(meta, 12, 2, 15)[..., 1] << torch.arange(0, 16, 4, device=blocks.device)).sum(dim=1)
    d = bits16.to(torch.int16).view(torch.float16).float()[:, None]
    scale = d * (2 * _shifted(meta, 3, 4, 7).flatten(1) + 1).float()  # one for each 16 weights
    fields = bits(high, 4).flatten(1).long()
    index = q.long() | ((fields & 7) << 8)
    shifted = _points("IQ1_M", blocks.device)[index] + _delta(fields >> 3)[..., None]
    return (scale[..., None] * shifted.view(*scale.shape, -1)).flatten(1)


def _delta(negative: Tensor) -> Tensor:
    return DELTA - 2 * DELTA * (negative & 1).float()


def _iq4_nl(blocks: Tensor) -> Tensor:
    d, q = split(blocks, 2, 16)
    return f16(d) * table(IQ4_LEVELS, torch.float32, blocks.device)[nibbles(q).int()]


def _iq4_xs(blocks: Tensor) -> Tensor:
    d, high, low, q = split(blocks, 2, 2, 4, 128)
    scales = bits(low, 4).flatten(1).long() | (_shifted(words(high, 2), 2, 8, 3).flatten(1) << 4)
    scale = f16(d) * (scales - 32).float()
    runs = q.view(-1, 8, 16)
    levels = table(IQ4_LEVELS, torch.float32, blocks.device)[torch.cat([runs & 15, runs >> 4], dim=2).int()]
    return (scale[..., None] * levels).flatten(1)


BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
