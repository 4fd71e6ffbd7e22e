"""A linear layer whose weight stays FP8; each forward pass dequantizes it, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from polyquant_fp8.blocks import Block, dequantize

KERNEL = "torch dequantize and matmul"
CHUNK_WEIGHTS = {"cpu": 2**20, "other": 2**26}
"""Weights dequantized at a time: 4 MiB on the CPU."""


class Product(torch.autograd.Function):
    """y = x W^T, x (tokens, in_features); the weight is dequantized again for the gradient of x, and gets none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scales: Tensor, block: Block) -> Tensor:
        ctx.save_for_backward(weight, scales)
        ctx.block = block
        pieces = [functional.linear(x, numbers.to(x.dtype)) for numbers in _pieces(weight, scales, block)]
        return torch.cat(pieces, -1) if len(pieces) > 1 else pieces[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, scales = ctx.saved_tensors
        total, start = None, 0
        for numbers in _pieces(weight, scales, ctx.block):
            part = gradient[:, start : start + len(numbers)] @ numbers.to(gradient.dtype)
            total, start = part if total is None else total + part, start + len(numbers)
        return total, None, None, None


class Fp8Linear(nn.Linear):
    """weight e4m3 (out_features, in_features), weight_scale_inv () or one for each block; names as in transformers."""

    weight_scale_inv: nn.Parameter

    def __init__(
        self, linear: nn.Linear, weight: Tensor, scales: Tensor, block: Block, activation_scale: Tensor | None = None
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.block = block
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scales, requires_grad=False)
        self.bias = linear.bias
        if activation_scale is not None:  # kept for saving; activations are not rounded here
            self.activation_scale = nn.Parameter(activation_scale, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) to (..., out_features), in the dtype of the input."""
        tokens = input.reshape(-1, self.in_features)
        y: Tensor = Product.apply(tokens, self.weight, self.weight_scale_inv, self.block)
        y = y.view(*input.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def _pieces(weight: Tensor, scales: Tensor, block: Block) -> Iterator[Tensor]:
    """The rows as numbers, whole blocks of rows at a time."""
    size = CHUNK_WEIGHTS["cpu" if weight.device.type == "cpu" else "other"]
    rows = max(1, size // weight.shape[1])
    if block is None:
        yield from (dequantize(part, scales, block) for part in weight.split(rows))
        return
    blocks = max(1, rows // block[0])
    for part, own in zip(weight.split(blocks * block[0]), scales.split(blocks), strict=True):
        yield dequantize(part, own, block)
