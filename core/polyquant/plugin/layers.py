"""Quantized modules: how they are described, their products with packed weights, and the gradients. Imports torch.

Left to itself, autograd would keep each dequantized weight until the backward pass: a dense model again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from polyquant.errors import ModelError
from polyquant.loaded import LoadedModel
from polyquant.plugin.describe import Quantized, describe

__all__ = [
    "Quantized", "describe", "differentiable", "frozen_for_adapters", "frozen_linear", "layer_tensors",
    "needs_gradient", "prepare_for_training", "rows_at_a_time", "weight_rows",
]  # fmt: skip

Multiply = Callable[[Tensor], Tensor]
Pieces = Callable[[], Iterable[Tensor]]

CHUNK_WEIGHTS = {"cpu": 2**20, "other": 2**26}
"""Weights dequantized at a time. CPU: 4 MiB of float32, so that an output head never stands in memory whole."""
IDENTITY_ROWS = 256
"""Rows of the identity matrix that `weight_rows` multiplies at a time."""


def layer_tensors(
    linear: Any, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[tuple[int, ...], str]]
) -> dict[str, Tensor]:
    """A checkpoint's tensors of a layer that takes the place of `linear`, in the shapes that are expected.

    expected: name -> (shape, dtype), with "float" for any dtype of floating point; the bias of `linear` is added.
    Tools differ in axes of length 1, as of the scale of a whole weight: (), (1,) or (1, 1). So those need not match.
    Raises ModelError where a tensor is missing, has no place, or is of another shape or dtype.
    """
    size = (linear.out_features, linear.in_features)
    wanted = {**expected, **({"bias": ((size[0],), "float")} if linear.bias is not None else {})}
    if missing := sorted(set(wanted) - set(tensors)):
        raise ModelError(f"{', '.join(missing)} is missing; it has {', '.join(sorted(tensors)) or 'nothing'}")
    if astray := sorted(set(tensors) - set(wanted)):
        raise ModelError(f"{', '.join(astray)} has no place beside {', '.join(sorted(wanted))}")
    for name, (shape, dtype) in wanted.items():
        tensor = tensors[name]
        right = tensor.is_floating_point() if dtype == "float" else tensor.dtype == getattr(torch, dtype)
        if not right or _without_ones(tensor.shape) != _without_ones(shape):
            stored = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            raise ModelError(f"{name} of a layer {size} should be {shape} {dtype}, and is {stored}")
    return {name: tensors[name].reshape(shape) for name, (shape, _) in wanted.items()}


def _without_ones(shape: Iterable[int]) -> list[int]:
    return [length for length in shape if length != 1]


def rows_at_a_time(columns: int, device: torch.device) -> int:
    """Rows of a weight, of so many columns, to dequantize at a time."""
    return max(1, CHUNK_WEIGHTS["cpu" if device.type == "cpu" else "other"] // columns)


def frozen_linear(inputs: Tensor, pieces: Pieces, bias: Tensor | None = None) -> Tensor:
    """inputs @ W.T + bias, with W dequantized for the product, and again for its gradient, and never kept.

    inputs: (..., in_features). pieces: gives W anew, some of its rows at a time, (rows, in_features), in any dtype;
    the product is computed in that of the inputs. Returns (..., out_features).
    """
    if not needs_gradient(inputs):
        return _product(inputs, pieces, bias)
    product: Tensor = _Packed.apply(inputs, pieces, bias)
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


def _product(inputs: Tensor, pieces: Pieces, bias: Tensor | None) -> Tensor:
    products, start = [], 0
    for piece in pieces():
        end = start + len(piece)
        products.append(functional.linear(inputs, piece.to(inputs.dtype), None if bias is None else bias[start:end]))
        start = end
    return products[0] if len(products) == 1 else torch.cat(products, -1)


class _Packed(torch.autograd.Function):  # type: ignore[misc]  # torch is not typed here
    @staticmethod
    def forward(context: Any, inputs: Tensor, pieces: Pieces, bias: Tensor | None) -> Tensor:
        context.pieces = pieces
        return _product(inputs, pieces, bias)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        total, start = None, 0
        for piece in context.pieces():
            end = start + len(piece)
            part = gradient[..., start:end] @ piece.to(gradient.dtype)
            total, start = part if total is None else total.add_(part), end
        bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if context.needs_input_grad[2] else None
        return total, None, bias


class _Multiplied(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(context: Any, inputs: Tensor, multiply: Multiply) -> Tensor:
        context.multiply, context.like = multiply, inputs.new_empty(0, inputs.shape[-1])
        return multiply(inputs)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return torch.cat([gradient @ rows.T for rows in weight_rows(context.multiply, context.like)], -1), None


def prepare_for_training(loaded: LoadedModel) -> Any:
    """The hook, for layers whose products have gradients: the base frozen, activations recomputed."""
    return frozen_for_adapters(loaded.model)


def frozen_for_adapters(model: Any) -> Any:
    """`model` with its base frozen and activations recomputed in the backward pass: what `prepare_for_training` gives.

    PEFT's prepare_model_for_kbit_training does this too, and casts every 16-bit parameter to float32, which packed
    tensors of several libraries refuse.
    """
    model.requires_grad_(requires_grad=False)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model
