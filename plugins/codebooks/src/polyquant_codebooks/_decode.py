"""What several formats are made of: Hadamard rotations, permutations, and codes of up to 32 bits. Imports torch."""

from __future__ import annotations

import torch
from polyquant.errors import ModelError
from torch import Tensor


def rotated(values: Tensor, size: int) -> Tensor:
    """Each block of `size` along the last axis times the orthonormal Hadamard matrix of Sylvester, in their dtype.

    values: (..., blocks * size), size a power of two. It is its own inverse.
    """
    whole = values.unflatten(-1, (-1, size))
    width = 1
    while width < size:
        pairs = whole.unflatten(-1, (-1, 2, width))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        whole = torch.stack([first + second, first - second], -2).flatten(-3)
        width *= 2
    return (whole * size**-0.5).flatten(-2)


def unsigned(codes: Tensor) -> Tensor:
    """Numbers of 16 bits that are kept as int16, as int64."""
    return codes.long() & 0xFFFF


def stream(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of `bits` bits in rows of 32-bit words, the first in the lowest bits: int64 (..., count).

    words: int32 (..., n). bits: at most 32. A code may lie in two words.
    """
    wide = words.long() & 0xFFFFFFFF
    wide = torch.nn.functional.pad(wide, (0, 1))  # what the last code may reach into
    starts = torch.arange(count, device=words.device) * bits
    word, shift = starts // 32, starts % 32
    low = wide[..., word] >> shift
    high = torch.where(shift > 0, wide[..., word + 1] << (32 - shift), 0)
    return (low | high) & ((1 << bits) - 1)


def require_permutation(name: str, order: Tensor, count: int) -> None:
    """Raises ModelError where `order` does not name each of `count` columns once."""
    if not torch.equal(order.sort().values, torch.arange(count, device=order.device)):
        raise ModelError(f"{name} should name each of {count} columns once")


def require_below(name: str, codes: Tensor, count: int) -> None:
    """Raises ModelError where one of `codes` is not below `count`."""
    if codes.numel() and int(codes.max()) >= count:
        raise ModelError(f"{name} holds {int(codes.max())}, and there are {count}")
