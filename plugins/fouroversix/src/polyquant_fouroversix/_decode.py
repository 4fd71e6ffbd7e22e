"""The formats in torch: packed weights to numbers, and activations to the numbers that the format has."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fouroversix.quantize import from_blocked
from polyquant.plugin import activation_formats, activations
from polyquant.plugin.floats import E2M1
from torch import Tensor

from polyquant_fouroversix._library import codes_as_numbers
from polyquant_fouroversix.formats import BLOCK, SWIZZLED, largest
from polyquant_fouroversix.options import FouroversixOptions

CHUNK_WEIGHTS = {"cpu": 2**18, "other": 2**26}
"""Weights dequantized at a time: 1 MiB on the CPU."""
INT_IN_IF4 = 6 / 7
"""An INT4 block of IF4 reaches as far as an FP4 one."""
MXFP4 = activation_formats.MXFP4._replace(exponents="ceil")
EMPTY = 2.0**-127  # scale of an MXFP4 block of zeros; the library divides by zero there, and its codes mean nothing


def _of_bytes(codes: list[float]) -> Tensor:
    """(256, 2): the numbers of the two codes in a byte, the low four bits first."""
    numbers = torch.tensor(codes, dtype=torch.float32)
    return torch.stack([numbers.repeat(16), numbers.repeat_interleave(16)], 1)


TWOS_COMPLEMENT = [*range(8), *range(-8, 0)]
FP4, INT4 = _of_bytes([*E2M1]), _of_bytes(TWOS_COMPLEMENT)
TABLES = {"nvfp4": FP4, "mxfp4": FP4, "nvint4": INT4, "if4": torch.cat([FP4, INT4 * INT_IN_IF4])}
"""Format -> the numbers of a byte of codes; for IF4 those of a byte in an FP4 block, then in an INT4 one."""


def dequantize(codes: Tensor, scales: Tensor, amax: Tensor, config: FouroversixOptions) -> Iterator[Tensor]:
    """The numbers, float32 (rows, columns), some rows at a time, padding included.

    codes: uint8 (rows, columns / 2). scales: as they are stored. amax: (1,).
    """
    block, (rows, half) = BLOCK[config.dtype], codes.shape
    factors, whole = block_factors(codes, scales, amax, config)
    per_row = factors.shape[1]
    table = TABLES[config.dtype].to(codes.device)
    step = max(1, CHUNK_WEIGHTS["cpu" if codes.device.type == "cpu" else "other"] // (2 * half))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        places = codes[part].int()
        if whole is not None:
            places.view(-1, per_row, block // 2).add_(whole[part].unsqueeze(-1), alpha=256)
        numbers = torch.index_select(table, 0, places.flatten()).view(-1, per_row, block)
        yield numbers.mul_(factors[part].unsqueeze(-1)).view(-1, 2 * half)


def block_factors(
    codes: Tensor, scales: Tensor, amax: Tensor, config: FouroversixOptions
) -> tuple[Tensor, Tensor | None]:
    """Of the blocks as `dequantize` takes them, (rows, blocks in a row): what codes are multiplied with, float32; and
    for IF4 which are INT4."""
    return _factors(block_scales(codes, scales, config), amax, config)


def block_scales(codes: Tensor, scales: Tensor, config: FouroversixOptions) -> Tensor:
    """The scales as they are stored, (rows, blocks in a row)."""
    rows, per_row = codes.shape[0], 2 * codes.shape[1] // BLOCK[config.dtype]
    if config.dtype in SWIZZLED:
        scales = from_blocked(scales, (rows, per_row))
    return scales.reshape(rows, per_row)


def rounded(x: Tensor, config: FouroversixOptions) -> Tensor:
    """x (..., features), each block rounded to the format; of formats with E4M3 scales one greatest number for all."""
    if (config.dtype, config.scale_rule) == ("mxfp4", "static_6"):
        return activations.rounded(x, MXFP4)
    # The others are the library's alone: it chooses scales by the error (4/6, IF4) or for 4 as the largest code, and in
    # NVFP4 multiplies by the reciprocal of a scale, which is 0 below 2^-10 of the most: others divide, and have 2^-9.
    return by_library(x.reshape(-1, x.shape[-1]), config).view_as(x)


def by_library(x: Tensor, config: FouroversixOptions) -> Tensor:
    """x (tokens, features), rounded."""
    block, features = BLOCK[config.dtype], x.shape[1]
    values, scales, amax = codes_as_numbers(x, config)
    factors, whole = _factors(scales.view(-1, 1), amax, config)
    numbers = values.float().view(-1, block)
    if whole is not None:
        numbers = torch.where(whole, numbers * INT_IN_IF4, numbers)
    if config.dtype == "mxfp4":  # the library divides by the scale of a block of zeros
        numbers = torch.where(factors > 0, numbers, 0.0)
    return (numbers * factors).view(len(x), -1)[:, :features].to(x.dtype)


def _factors(scales: Tensor, amax: Tensor, config: FouroversixOptions) -> tuple[Tensor, Tensor | None]:
    """(what a block's codes are multiplied with, float32; for IF4 which blocks are INT4, told by the scale's sign)."""
    if config.dtype == "mxfp4":
        factors = scales.float()
        return torch.where(factors > EMPTY, factors, 0.0), None
    whole = None
    if config.dtype == "if4":
        bits = scales.view(torch.uint8)
        whole, scales = bits >= 0x80, (bits & 0x7F).view(torch.float8_e4m3fn)
    return scales.float() * (amax / largest(config.dtype, config.scale_rule)), whole
