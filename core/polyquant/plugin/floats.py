"""Floats of 4 and 8 bits as checkpoints hold them: E2M1 two to a byte, E4M3, and scales in E8M0. Imports torch.

OCP Microscaling Formats 1.0: E2M1 is a sign, two bits of exponent and one of mantissa; an E8M0 byte b is 2^(b - 127),
and 255 is NaN. Two E2M1 codes lie in a byte, the first in its low four bits.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from polyquant.packed_weights import format as layout

E2M1 = layout.E2M1
"""The number of each code."""
MOST_E2M1, MOST_E4M3 = 6.0, 448.0
"""The largest numbers."""
E8M0_BIAS, NAN_E8M0 = 127, 255


def codes_of_pairs(pairs: Tensor) -> Tensor:
    """The 4-bit codes in bytes, the low four bits first: uint8 (..., n) to uint8 (..., 2 n)."""
    return torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)


def pairs_of_codes(codes: Tensor) -> Tensor:
    """Two 4-bit codes in each byte, the first in the low bits: uint8 (..., 2 n) to uint8 (..., n)."""
    first, second = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return first | (second << 4)


def e2m1_numbers(pairs: Tensor) -> Tensor:
    """The numbers of E2M1 codes in bytes: uint8 (..., n) to float32 (..., 2 n). One look-up gives both of a byte."""
    numbers = torch.tensor(E2M1, device=pairs.device)
    table = torch.stack([numbers.repeat(16), numbers.repeat_interleave(16)], 1)
    return torch.index_select(table, 0, pairs.reshape(-1).int()).view(*pairs.shape[:-1], 2 * pairs.shape[-1])


def e2m1_codes(numbers: Tensor, ties: Literal["even", "zero"] = "even") -> Tensor:
    """The codes nearest to numbers, larger ones to 6: uint8 like `numbers`.

    ties: to the even code, as OCP has it, or towards zero, as MLX. The sign is kept where a number rounds to zero, as
    ModelOpt and OCP's reference keep it.
    """
    sizes = numbers.abs()
    steps = (sizes >= 2).to(sizes.dtype).add_(sizes >= 4)  # codes are 1/2 apart below 2, 1 below 4, 2 above
    counts = torch.ldexp(sizes, 1 - steps)
    codes = (counts.round_() if ties == "even" else counts.sub_(0.5).ceil_()).add_(steps, alpha=2)
    return torch.fmin(codes, codes.new_tensor(7)).to(torch.uint8) | (numbers < 0).to(torch.uint8) << 3


def e8m0_numbers(scales: Tensor) -> Tensor:
    """The powers of two that E8M0 bytes stand for, float32; 255 is NaN. scales: uint8 or float8_e8m0fnu."""
    return scales.view(torch.float8_e8m0fnu).float()


def e8m0_bytes(exponents: Tensor) -> Tensor:
    """The E8M0 bytes, uint8, of whole exponents of two, which are clamped to -127 to 127."""
    return (exponents.clamp(-E8M0_BIAS, E8M0_BIAS) + E8M0_BIAS).to(torch.uint8)


def e4m3_numbers(codes: Tensor) -> tuple[Tensor, float]:
    """(float32 like `codes`, what they are still to be multiplied with, a power of two) of float8_e4m3fn.

    torch converts E4M3 one by one on the CPU; moved to where float16 has them, the same bits are the number / 256. NaN
    becomes 480: who reads a file refuses it.
    """
    if codes.device.type != "cpu":
        return codes.float(), 1.0
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return bits.view(torch.float16).float(), 256.0
