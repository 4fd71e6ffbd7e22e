"""Codes of 1 to 8 bits in a string of bytes, without a gap, the first in the lowest bits. Imports torch.

Code i of a row occupies bits i * bits to (i + 1) * bits of the row's bytes, least significant bit first; the same bytes
in words of 32 bits, little endian, are what MLX, VPTQ and compressed-tensors call packed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyquant.plugin.floats import codes_of_pairs, pairs_of_codes

EIGHT = 8  # codes of `bits` bits take as many bytes


def unpacked_bits(rows: Tensor, bits: int) -> Tensor:
    """Codes, uint8 (..., 8 * bytes / bits), of whole bytes (..., bytes). bits: of 8 codes, so bytes % bits is 0 where
    8 % bits is not."""
    if bits == EIGHT:
        return rows
    if bits == 4:
        return codes_of_pairs(rows)
    mask = 2**bits - 1
    if EIGHT % bits == 0:
        return torch.stack([(rows >> shift) & mask for shift in range(0, EIGHT, bits)], -1).flatten(-2)
    own = rows.unflatten(-1, (-1, bits)).to(torch.int16)  # eight codes of at most seven bits, each within two bytes
    codes = []
    for first in range(0, EIGHT * bits, bits):
        byte, shift = divmod(first, EIGHT)
        code = own[..., byte] >> shift
        if shift + bits > EIGHT:
            code = code | (own[..., byte + 1] << (EIGHT - shift))
        codes.append((code & mask).to(torch.uint8))
    return torch.stack(codes, -1).flatten(-2)


def packed_bits(codes: Tensor, bits: int) -> Tensor:
    """The bytes of codes below 2^bits, uint8 (..., count) to uint8 (..., count * bits / 8). count: of whole bytes, in
    eights where 8 % bits is not 0."""
    if bits == EIGHT:
        return codes
    if bits == 4:
        return pairs_of_codes(codes)
    each = EIGHT // bits if EIGHT % bits == 0 else EIGHT
    own, count = codes.unflatten(-1, (-1, each)).long(), each * bits // EIGHT
    words = sum((own[..., place] << (place * bits) for place in range(1, each)), start=own[..., 0])
    return torch.stack([(words >> (EIGHT * place)) & 255 for place in range(count)], -1).flatten(-2).to(torch.uint8)
