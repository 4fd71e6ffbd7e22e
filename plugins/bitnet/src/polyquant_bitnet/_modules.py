"""A linear layer of ternary weights, packed four a byte, and its product with int8 activations."""

from __future__ import annotations

from typing import Any

import torch
from polyquant.errors import ModelError
from torch import Tensor, nn
from torch.nn import functional

from polyquant_bitnet.planning import PACKED

INT8, FLOAT = "torch int8 matmul", "torch dequantize and matmul"
SHIFTS = range(0, 2 * PACKED, 2)
LEAST = 1e-5  # the least greatest activation of a token, and mean of a weight: divisors


def pack(ternary: Tensor) -> Tensor:
    """(out_features, in_features) of -1, 0 and 1 to uint8 (out_features / 4, in_features).

    The first quarter of the rows is in the lowest two bits of each byte, and so on.
    """
    quarters = (ternary + 1).to(torch.uint8).chunk(PACKED)
    return sum(quarter << shift for quarter, shift in zip(quarters, SHIFTS, strict=True))  # type: ignore[return-value]


def unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `pack`."""
    return torch.cat([((packed >> shift) & 3).to(dtype) for shift in SHIFTS]).sub_(1)


def ternarize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(ternary, scale) by the mean of the absolute weights, as BitNet b1.58 trains them. Computed in float32."""
    scale = weight.float().abs().mean().clamp_min(LEAST)
    return (weight.float() / scale).round_().clamp_(-1, 1), scale.reshape(1)


def exact(rounded: Tensor, scale: Tensor, packed: Tensor, divisor: Tensor, dtype: torch.dtype) -> Tensor:
    """Integer sums, then the scales. rounded: (tokens, in_features), numbers of an int8, of `scale` for each token."""
    sums = torch._int_mm(rounded.to(torch.int8), unpack(packed, torch.int8).T)
    return (sums / (scale * divisor)).to(dtype)


def scaled(rounded: Tensor, scale: Tensor, packed: Tensor, divisor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same with the activations scaled back first, so that float16 does not overflow; for devices but the CPU."""
    return functional.linear((rounded / scale).to(dtype), unpack(packed, dtype)) / divisor


class TernaryProduct(torch.autograd.Function):
    """x (tokens, in_features), rounded to int8 a token, times the ternary weight; the gradient passes the rounding.

    The result is divided by `divisor`, (1,); on the CPU in float32 it is that of transformers' BitLinear bit for bit.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, divisor: Tensor) -> Tensor:
        ctx.save_for_backward(packed, divisor)
        scale = 127 / x.float().abs().amax(-1, keepdim=True).clamp_min(LEAST)
        rounded = (x.float() * scale).round_().clamp_(-128, 127)
        product = exact if x.device.type == "cpu" else scaled
        return product(rounded, scale, packed, divisor, x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        packed, divisor = ctx.saved_tensors
        return gradient @ unpack(packed, gradient.dtype) / divisor, None, None


class TernaryLinear(nn.Linear):
    """What transformers' BitLinear and (offline) AutoBitLinear compute, with weights that stay packed.

    divides: `weight_scale` is to divide by, and the bias is added last (BitLinear); else it multiplies, the bias too.
    """

    weight_scale: nn.Parameter

    def __init__(self, linear: nn.Linear, *, divides: bool, norm: nn.Module | None = None) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.divides, self.rms_norm = divides, norm

    @property
    def kernel(self) -> str:
        """What multiplies on the device it is on."""
        return INT8 if self.weight.device.type == "cpu" else FLOAT

    def assign(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Take stored tensors of the right shapes. Raises ModelError for impossible values."""
        if bool((weight & (weight >> 1) & 0b01010101).any()):
            raise ModelError("it has weights that are none of -1, 0 and 1: damaged, or packed another way")
        if not 0 < float(scale) < float("inf"):
            raise ModelError(f"its weight_scale should be positive, and is {float(scale)}")
        for key, tensor in {"weight": weight, "weight_scale": scale, "bias": bias}.items():
            setattr(self, key, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) to (..., out_features)."""
        x = input if self.rms_norm is None else self.rms_norm(input)
        divisor = self.weight_scale if self.divides else torch.ones_like(self.weight_scale)
        y: Tensor = TernaryProduct.apply(x.reshape(-1, self.in_features), self.weight, divisor)
        y = y.view(*input.shape[:-1], self.out_features)
        if self.bias is not None:
            y = y + self.bias
        return y if self.divides else y * self.weight_scale
