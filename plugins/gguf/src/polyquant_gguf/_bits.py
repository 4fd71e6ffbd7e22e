"""Bit fields of packed bytes, in torch."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def split(blocks: Tensor, *widths: int) -> tuple[Tensor, ...]:
    """The fields of a block struct, each contiguous: uint8 (count, width)."""
    return tuple(part.contiguous() for part in blocks.split(widths, dim=1))


def f16(part: Tensor) -> Tensor:
    """Two bytes a block as float16, in float32 (count, 1)."""
    return part.view(torch.float16).float()


def nibbles(part: Tensor) -> Tensor:
    """All low nibbles, then all high ones: uint8 (count, width) to (count, 2 * width)."""
    return torch.cat([part & 15, part >> 4], dim=1)


def bits(part: Tensor, width: int) -> Tensor:
    """Fields of `width` bits, lowest first: (count, bytes) to (count, bytes, fields a byte), in the dtype of `part`."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=part.device).to(part.dtype)
    return (part[..., None] >> shifts) & (2**width - 1)


def words(part: Tensor, width: int) -> Tensor:
    """`width` bytes each as one little-endian number: uint8 (count, n * width) to int64 (count, n)."""
    grouped = part.reshape(part.shape[0], -1, width).long()
    return sum((grouped[..., byte] << (8 * byte) for byte in range(1, width)), start=grouped[..., 0])


@cache
def table(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A constant on a device, made once."""
    return torch.tensor(values, dtype=dtype, device=device)
