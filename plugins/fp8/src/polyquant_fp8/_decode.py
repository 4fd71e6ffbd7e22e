"""float8 e4m3 in scaled blocks: to numbers and back."""

from __future__ import annotations

import torch
from polyquant.plugin.floats import e4m3_numbers
from polyquant.plugin.layers import Rows, in_bands, largest
from torch import Tensor

from polyquant_fp8.options import Block

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
TINY = torch.finfo(torch.float32).tiny

LEAST = 1e-12  # the greatest number of a row of zeros, as FBGEMM has it


def quantize(weight: Rows, block: Block, *, powers_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """(e4m3 weight, scales): the greatest number of each block becomes 448.

    Same bytes as transformers' Fp8Quantize, and of rows as the torch branch of FBGEMM's quantize_fp8_row.
    weight: (out_features, in_features). scales: to multiply with, float32 or e8m0, () or one for each block.
    """
    of_all = _scales(largest(weight), powers_of_two) if block is None else None

    def rounded(rows: Tensor) -> dict[str, Tensor]:
        numbers = rows.to(torch.float32, copy=True)
        scales, inverse = of_all or _scales(_greatest(numbers, block), powers_of_two)
        codes = _times(numbers, inverse, block).clamp_(-LARGEST, LARGEST).to(E4M3)
        return {"codes": codes} if of_all else {"codes": codes, "scales": scales}

    made = in_bands(weight, rounded, multiple=1 if block is None else block[0])
    return made["codes"], of_all[0] if of_all else made["scales"]


def _greatest(numbers: Tensor, block: tuple[int, int]) -> Tensor:
    """Of each block, without signs."""
    if block == (1, -1):
        return numbers.abs().amax(1, keepdim=True).clamp_min(LEAST)
    return torch.stack(
        [torch.stack([part.abs().max() for part in rows.split(block[1], 1)]) for rows in numbers.split(block[0])]
    )


def _scales(greatest: Tensor, powers_of_two: bool) -> tuple[Tensor, Tensor]:
    """(what numbers are stored with, what they are multiplied by to be rounded)."""
    inverse = torch.where(greatest > 0, LARGEST / greatest, torch.ones_like(greatest))
    scales = 1.0 / inverse
    if not powers_of_two:
        return scales, inverse
    scales = torch.pow(2.0, scales.clamp_min(TINY).log2().ceil()).to(torch.float8_e8m0fnu)
    return scales, 1.0 / scales.float()


def dequantize(weight: Tensor, scales: Tensor, block: Block) -> Tensor:
    """The numbers, float32. weight: whole blocks of rows, and their scales."""
    numbers, factor = e4m3_numbers(weight)
    return _times(numbers, scales.float() * factor, block)


def _times(numbers: Tensor, scales: Tensor, block: Block) -> Tensor:
    """`numbers` in place, each block times its scale."""
    if block is None or block == (1, -1):
        return numbers.mul_(scales)
    rows, size = scales.repeat_interleave(block[0], 0)[: numbers.shape[0]], block[1]
    whole = numbers.shape[1] // size
    numbers[:, : whole * size].unflatten(1, (whole, size)).mul_(rows[:, :whole, None])
    numbers[:, whole * size :].mul_(rows[:, whole:])
    return numbers
