"""A linear layer whose weight stays packed; each forward pass dequantizes it, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from polyquant_fouroversix.numbers import dequantize, rounded
from polyquant_fouroversix.options import FouroversixOptions


class Product(torch.autograd.Function):
    """y = x W^T, x (tokens, in_features) rounded where the layer says so; the weight gets no gradient.

    The gradient of x passes its rounding straight through; the weight is dequantized again for it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FouroversixLinear) -> Tensor:
        ctx.layer = layer
        if layer.config.quantize_activations:
            x = rounded(x, layer.config)
        pieces = [functional.linear(x, numbers.to(x.dtype)) for numbers in layer.pieces()]
        return torch.cat(pieces, -1) if len(pieces) > 1 else pieces[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        total, start = None, 0
        for numbers in ctx.layer.pieces():
            part = gradient[:, start : start + len(numbers)] @ numbers.to(gradient.dtype)
            total, start = part if total is None else total + part, start + len(numbers)
        return total, None


class FouroversixLinear(nn.Linear):
    """weight: codes, uint8 (rows, columns / 2); scales; amax (1,); padded as in the library. A Linear, for PEFT.

    The library's own layer gives no gradient without a dense copy of the weight, and dequantizes 6 to 15 times slower.
    """

    weight: Tensor  # type: ignore[assignment]
    scales: Tensor
    amax: Tensor

    def __init__(self, linear: nn.Linear, config: FouroversixOptions, tensors: Mapping[str, Tensor]) -> None:
        """linear: gives sizes and bias; tensors: weight, scales and amax, checked."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.config = linear.in_features, linear.out_features, config
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.bias = linear.bias
        self.eval()

    def pieces(self) -> Iterator[Tensor]:
        """The weight without its padding, float32, some rows at a time."""
        done = 0
        for numbers in dequantize(self.weight, self.scales, self.amax, self.config):
            if done < self.out_features:
                yield numbers[: self.out_features - done, : self.in_features]
            done += len(numbers)

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) to (..., out_features), in the dtype of the input."""
        y: Tensor = Product.apply(input.reshape(-1, self.in_features), self)
        y = y.view(*input.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias
