"""An EXL3 layer: a trellis of states, a value for each, rotated on both sides. Imports torch.

A tile of 16 inputs and 16 outputs is a string of bits, most significant first, in which the state of a weight is the 16
bits that end with its own; the string is a circle. Its value is a hash of the state.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from msgspec.structs import replace
from polyquant.errors import ModelError
from polyquant.plugin import LoadRequest
from polyquant.plugin.layers import Part
from safetensors import safe_open
from torch import Tensor

from polyquant_codebooks._decode import rotated
from polyquant_codebooks._modules import CodebookLinear
from polyquant_codebooks.exl3.options import BLOCK, TILE, Exl3Options
from polyquant_codebooks.options import CodebookOptions

MULTIPLIERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}
"""Tensor that a layer has where its hash is not the first one -> the number that it has to hold."""
SIGNS = {"suh": "su", "svh": "sv"}
"""Scales of inputs and outputs -> the signs that older files have in their place, sixteen in a number."""
SLOW = (
    "EXL3 is decoded in plain torch, layer by layer in each pass: right on any device, and slow; exllamav3 runs it "
    "fast on an NVIDIA GPU"
)


class Exl3Linear(CodebookLinear):
    """y = svh * H(W' H(suh * x)), H the Hadamard matrix in blocks of 128."""

    codebook: str

    @classmethod
    def parts(cls, config: CodebookOptions, name: str, linear: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """With the older files' signs, and what says which hash."""
        expected = super().parts(config, name, linear, tensors)
        for scale, signs in SIGNS.items():
            if signs in tensors and scale not in tensors:
                length = expected.pop(scale).shape[0]
                expected[signs] = Part((length // TILE,), "int16")
        for short, number in MULTIPLIERS.items():
            if short in tensors:
                least = number - 2**32
                if tensors[short].numel() == 1 and int(tensors[short]) != least:
                    raise ModelError(f"{short} holds {int(tensors[short]):#x}, and {least:#x} is known")
                expected[short] = Part((), "int32", least, least)
        if set(MULTIPLIERS) <= set(expected):
            raise ModelError("it has mcg and mul1, which are two tables of values")
        return expected

    def configure(self, config: CodebookOptions, name: str) -> None:
        self.codebook = next((short for short in MULTIPLIERS if self._has(short)), "")

    def before(self, input: Tensor) -> Tensor:
        return rotated(input * self._scales("suh").to(input.dtype), BLOCK)

    def after(self, output: Tensor) -> Tensor:
        return rotated(output, BLOCK) * self._scales("svh").to(output.dtype)

    def inner(self) -> Tensor:
        trellis, bits = self._of("trellis"), int(self.bits)
        down, across = trellis.shape[:2]
        # pairs of int16 are words whose bits are read from the highest one: the second of a pair comes first
        halves = trellis.view(down, across, -1, 2).flip(-1).flatten(-2).long() & 0xFFFF
        first, shift = _places(bits)
        first, shift = first.to(trellis.device), shift.to(trellis.device)
        following = (first + 1) % (TILE * bits)
        states = ((halves[..., first] << 16 | halves[..., following]) >> shift) & 0xFFFF
        values = _table(self.codebook).to(trellis.device)[states]  # (down, across, 256), in the order of [k, n]
        return values.view(down, across, TILE, TILE).permute(1, 3, 0, 2).reshape(self.out_features, self.in_features)

    def dequantize(self) -> Tensor:
        """The weight, float32 (out_features, in_features)."""
        whole = rotated(rotated(self.inner(), BLOCK).T, BLOCK).T
        return whole * self._scales("svh")[:, None] * self._scales("suh")

    def _scales(self, name: str) -> Tensor:
        if self._has(name):
            return self._of(name).float()
        words = self._of(SIGNS[name]).long() & 0xFFFF
        negative = (words[:, None] >> torch.arange(TILE, device=words.device)) & 1
        return 1.0 - 2.0 * negative.flatten().float()


@cache
def _places(bits: int) -> tuple[Tensor, Tensor]:
    """Of each weight of a tile, in the order of [k, n]: the 16 bits that its state begins in, and the shift from there.

    The state of weight t ends with bit (t + 1) * bits of 256 * bits.
    """
    order = torch.empty(TILE, TILE, dtype=torch.long)
    for t in range(TILE * TILE):
        lane, half, inside = t // 8, t // 4 % 2, t % 4
        order[lane % 4 * 2 + (0, 1, 8, 9)[inside], lane // 4 + 8 * half] = t
    start = ((order.flatten() + 1) * bits - 16) % (256 * bits)
    return start // 16, 16 - start % 16


@cache
def _table(codebook: str) -> Tensor:
    """The value of each of 65536 states, float32, computed in float16 as exllamav3's kernels do."""
    states = torch.arange(65536, dtype=torch.int64)
    if codebook == "mul1":
        hashed = states * MULTIPLIERS["mul1"] & 0xFFFFFFFF
        total = sum((hashed >> shift) & 0xFF for shift in (0, 8, 16, 24))
        number = (0x6400 + total).to(torch.uint16).view(torch.float16).double()  # 1024 and the sum
        factor, less = torch.tensor([0x1EEE, 0xC931], dtype=torch.uint16).view(torch.float16).double()
        return (number * factor + less).half().float()  # rounded once
    hashed = states * MULTIPLIERS["mcg"] if codebook == "mcg" else states * 89226354 + 64248484
    mixed = (hashed & 0x8FFF8FFF) ^ 0x3B603B60
    low, high = ((mixed >> shift & 0xFFFF).to(torch.uint16).view(torch.float16) for shift in (0, 16))
    return (low + high).float()


def with_found_bits(config: Exl3Options, request: LoadRequest) -> Exl3Options:
    """`config` with the bits of modules that have others than it says, by the shapes of their trellis."""
    other = {}
    for file in request.source.weight_files:
        with safe_open(request.source.path / file, framework="pt") as content:
            for key in content.keys():  # noqa: SIM118  not a mapping
                home, _, short = key.rpartition(".")
                if short == "trellis":
                    shape = content.get_slice(key).get_shape()
                    bits = shape[-1] // TILE if len(shape) == 3 else 0
                    if bits in range(1, 9) and bits != config.bits_of(home):
                        other[home] = bits
    return replace(config, module_bits=tuple(sorted((dict(config.module_bits) | other).items()))) if other else config
