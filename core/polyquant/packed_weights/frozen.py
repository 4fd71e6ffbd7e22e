"""Linear layers with frozen packed weights: their products, and the gradients of those. Imports torch.

Left to itself, autograd would keep each dequantized weight until the backward pass: a dense model again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Multiply = Callable[[Tensor], Tensor]
Pieces = Callable[[], Iterable[Tensor]]

CHUNK_WEIGHTS = {"cpu": 2**20, "other": 2**26}
"""Weights dequantized at a time. CPU: 4 MiB of float32, so that an output head never stands in memory whole."""
IDENTITY_ROWS = 256
"""Rows of the identity matrix that `weight_rows` multiplies at a time."""


class PackedLinear(torch.nn.Linear):  # type: ignore[misc]  # torch is not typed here
    """`torch.nn.Linear` with packed tensors as its parameters, whose weight is dequantized anew for each product.

    A subclass says what they stand for in `dequantize`, and takes a faster product where it has one in `forward`.
    """

    def __init__(self, linear: Any, tensors: Mapping[str, Tensor]) -> None:
        """linear: what has its in_features and out_features. tensors: by name, a bias among them."""
        torch.nn.Module.__init__(self)  # nn.Linear's own would make a dense weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for name in ("weight", "bias"):
            self.register_parameter(name, None)
        for name, tensor in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        self.eval()

    rounding: Callable[[Any, Tensor], Tensor] | None = None
    """What a load that emulates rounded activations does to the layer's inputs: (layer, inputs) -> inputs."""

    @property
    def rounds_activations(self) -> bool:
        """Whether it is more than a weight and a bias."""
        return self.rounding is not None

    @property
    def static_scale(self) -> Tensor | None:
        """What a checkpoint has for rounding inputs, float32: see `polyquant.plugin.activations.rounded`."""
        return None

    def inputs(self, input: Tensor) -> Tensor:
        """`input` as the format's kernels multiply with it, where a load emulates them: a `forward` begins with it."""
        return input if self.rounding is None else self.rounding(self, input)

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in_features). Returns (..., out_features)."""
        return frozen_linear(self.inputs(input), lambda: [self.dequantize()], self.bias)

    def dequantize(self) -> Tensor:
        """The weight, (out_features, in_features)."""
        raise NotImplementedError


def rows_at_a_time(columns: int, device: torch.device) -> int:
    """Rows of a weight, of so many columns, to dequantize at a time."""
    return max(1, CHUNK_WEIGHTS["cpu" if device.type == "cpu" else "other"] // columns)


def frozen_linear(
    inputs: Tensor, pieces: Pieces, bias: Tensor | None = None, multiply: Multiply | None = None
) -> Tensor:
    """inputs @ W.T + bias, with W dequantized for the product, and again for its gradient, and never kept.

    inputs: (..., in_features). pieces: gives W anew, some of its rows at a time, (rows, in_features), in any dtype;
    the product is computed in that of the inputs. multiply: a kernel that gives the same without dequantizing, bias
    and all; the gradient is of `pieces`. Returns (..., out_features).
    """
    if not needs_gradient(inputs):
        return product_of_pieces(inputs, pieces, bias) if multiply is None else multiply(inputs)
    product: Tensor = _Packed.apply(inputs, pieces, bias, multiply)
    return product


def differentiable(multiply: Multiply, inputs: Tensor) -> Tensor:
    """multiply(inputs) with a gradient for the inputs.

    multiply: x -> x @ W for some W (in_features, out_features), given only as this function; the backward pass finds
    W, some rows at a time, by multiplying the identity matrix. inputs: (rows, in_features).
    """
    if not needs_gradient(inputs):
        return multiply(inputs)
    product: Tensor = _Multiplied.apply(inputs, multiply)
    return product


def weight_rows(multiply: Multiply, like: Tensor) -> Iterator[Tensor]:
    """W of multiply: x -> x @ W, some rows at a time: products with rows of the identity matrix.

    like: (..., in_features), of the dtype and device that `multiply` takes. Each piece is (rows, out_features).
    """
    size = like.shape[-1]
    for start in range(0, size, IDENTITY_ROWS):
        identity = like.new_zeros(min(IDENTITY_ROWS, size - start), size)
        identity.diagonal(start).fill_(1)
        yield multiply(identity)


def needs_gradient(inputs: Tensor) -> bool:
    """Whether autograd follows the inputs here."""
    return bool(torch.is_grad_enabled() and inputs.requires_grad)


def product_of_pieces(inputs: Tensor, pieces: Pieces, bias: Tensor | None) -> Tensor:
    """inputs @ W.T + bias, where `pieces` gives W some rows at a time."""
    products, start = [], 0
    for piece in pieces():
        end = start + len(piece)
        some = None if bias is None else bias[start:end].to(inputs.dtype)
        products.append(functional.linear(inputs, piece.to(inputs.dtype), some))
        start = end
    return products[0] if len(products) == 1 else torch.cat(products, -1)


class _Packed(torch.autograd.Function):  # type: ignore[misc]  # torch is not typed here
    @staticmethod
    def forward(context: Any, inputs: Tensor, pieces: Pieces, bias: Tensor | None, multiply: Multiply | None) -> Tensor:
        context.pieces = pieces
        return product_of_pieces(inputs, pieces, bias) if multiply is None else multiply(inputs)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        total, start = None, 0
        for piece in context.pieces():
            end = start + len(piece)
            part = gradient[..., start:end] @ piece.to(gradient.dtype)
            total, start = part if total is None else total.add_(part), end
        bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if context.needs_input_grad[2] else None
        return total, None, bias, None


class _Multiplied(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(context: Any, inputs: Tensor, multiply: Multiply) -> Tensor:
        context.multiply, context.like = multiply, inputs.new_empty(0, inputs.shape[-1])
        return multiply(inputs)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return torch.cat([gradient @ rows.T for rows in weight_rows(context.multiply, context.like)], -1), None
