"""Codes in the order of FLUTE's kernels: to rows, and back. Imports torch.

Stored are words of 16 bits, (out_features * bits / 16, in_features). Two neighbouring inputs share their words: a word
has codes of both, of outputs that are a tile apart.
"""

from __future__ import annotations

import torch
from polyquant.plugin.layers import in_bands
from torch import Tensor

BLOCKS3 = (0, 3, 6, 9, 12, 1, 4, 7, 10, 13, 2, 5, 8, 11, 14, 15)
"""Of the pairs of three-bit codes in six words: which tile of outputs each belongs to."""
TILE3, CODES3 = 32, 10
"""Outputs of a tile of three-bit codes, and codes in the 30 bits that two words have together."""


def rows_of_words(words: Tensor, bits: int, tile: int) -> Tensor:
    """Codes, int64 (out_features, in_features), of stored words, int16 (out_features * bits / 16, in_features)."""
    wide = words.T.long() & 0xFFFF
    return (_three(wide) if bits == 3 else _even(wide, bits, tile)).T


def words_of_rows(codes: Tensor, bits: int, tile: int) -> Tensor:
    """The inverse of `rows_of_words`."""

    def words(inputs: Tensor) -> dict[str, Tensor]:
        wide = _three_words(inputs.long()) if bits == 3 else _even_words(inputs.long(), bits, tile)
        return {"words": wide.to(torch.uint16).view(torch.int16)}

    return in_bands(codes.T, words, multiple=2)["words"].T.contiguous()


def _even(words: Tensor, bits: int, tile: int) -> Tensor:
    """Of 2 and 4 bits. words: (in_features, out_features * bits / 16). Returns (in_features, out_features)."""
    each = 16 // bits
    codes = (words[..., None] >> (bits * torch.arange(each, device=words.device))) & (2**bits - 1)
    lying = codes.view(len(words) // 2, 2, -1, tile, each // 2, 2).flip(-1)  # pair, half, tiles, place, block, input
    return lying.permute(0, 5, 2, 1, 4, 3).reshape(len(words), -1)


def _even_words(codes: Tensor, bits: int, tile: int) -> Tensor:
    each = 16 // bits
    lying = codes.reshape(len(codes) // 2, 2, -1, 2, each // 2, tile).permute(0, 3, 2, 5, 4, 1).flip(-1)
    shifts = bits * torch.arange(each, device=codes.device)
    return (lying.reshape(len(codes), -1, each) << shifts).sum(-1)


def _three(words: Tensor) -> Tensor:
    """Of 3 bits: 32 codes in three words of each of two inputs."""
    first, others = words.split([words.shape[1] // 3, words.shape[1] // 3 * 2], 1)
    pairs = len(words) // 2
    tiles = [first.view(pairs, 2, -1, 1, TILE3), others.reshape(pairs, 2, -1, 2, TILE3)]
    even, odd = torch.cat(tiles, 3).unbind(1)  # (pairs, tiles, 3, places)
    whole = even | ((odd & 0x3FFF) << 16)
    shifts = 3 * torch.arange(CODES3, device=words.device)
    codes = ((whole[..., None] >> shifts) & 7).transpose(2, 3).flatten(-2)  # (pairs, tiles, places, 30)
    left = (odd >> 14)[..., None] << torch.tensor([[[[0]], [[2]], [[4]]]], device=words.device)
    left = left.sum(2)[..., 0]
    codes = torch.cat([codes, torch.stack([left & 7, left >> 3], -1)], -1)
    by_block = torch.empty_like(codes).view(*codes.shape[:-1], 16, 2)
    by_block[..., list(BLOCKS3), :] = codes.view(*codes.shape[:-1], 16, 2).flip(-1)
    return by_block.permute(0, 4, 1, 3, 2).reshape(len(words), -1)


def _three_words(codes: Tensor) -> Tensor:
    by_block = codes.reshape(len(codes) // 2, 2, -1, 16, TILE3).permute(0, 2, 4, 3, 1)
    flat = by_block[..., list(BLOCKS3), :].flip(-1).flatten(-2)  # (pairs, tiles, places, 32)
    shifts = 3 * torch.arange(CODES3, device=codes.device)
    whole = (flat[..., :30].unflatten(-1, (3, CODES3)) << shifts).sum(-1)
    left = flat[..., 30] | flat[..., 31] << 3
    ends = (left[..., None] >> torch.tensor([0, 2, 4], device=codes.device)) & 3
    even, odd = whole & 0xFFFF, (whole >> 16) | ends << 14
    lying = torch.stack([even, odd], 1).permute(0, 1, 2, 4, 3)  # (pairs, 2, tiles, 3, places)
    return torch.cat([lying[:, :, :, :1].flatten(2), lying[:, :, :, 1:].flatten(2)], 2).reshape(len(codes), -1)
