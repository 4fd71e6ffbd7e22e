"""Gradients through frozen weights whose matmul has none of its own, as adapters below them need. Imports torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Multiply = Callable[[torch.Tensor], torch.Tensor]


def differentiable(multiply: Multiply, inputs: torch.Tensor) -> torch.Tensor:
    """multiply(inputs) with a gradient for the inputs.

    multiply: x -> x @ W for some W (in_features, out_features), given only as this function; the backward pass finds
    W, for as long as it runs, by multiplying the identity matrix. inputs: (rows, in_features).
    """
    result: torch.Tensor = _Frozen.apply(inputs, multiply)
    return result


class _Frozen(torch.autograd.Function):  # type: ignore[misc]  # torch is not typed here
    @staticmethod
    def forward(context: Any, inputs: torch.Tensor, multiply: Multiply) -> torch.Tensor:
        context.multiply, context.like = multiply, inputs.new_empty(0)
        context.in_features = inputs.shape[-1]
        return multiply(inputs)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        like = context.like
        weight = context.multiply(torch.eye(context.in_features, dtype=like.dtype, device=like.device))
        return gradient @ weight.T, None
