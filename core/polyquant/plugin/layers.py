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
    "Quantized", "describe", "differentiable", "finite_weight", "frozen_for_adapters", "frozen_linear",
    "needs_gradient", "prepare_for_training", "rows_at_a_time", "take_bias", "type_and_shape", "weight_rows",
]  # fmt: skip

Multiply = Callable[[Tensor], Tensor]
Pieces = Callable[[], Iterable[Tensor]]

CHUNK_WEIGHTS = {"cpu": 2**20, "other": 2**26}
"""Weights dequantized at a time. CPU: 4 MiB of float32, so that an output head never stands in memory whole."""
IDENTITY_ROWS = 256
"""Rows of the identity matrix that `weight_rows` multiplies at a time."""


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


def finite_weight(linear: Any) -> Tensor:
    """The weight of a dense layer, to be quantized. Raises ModelError where it holds NaN or infinity."""
    weight: Tensor = linear.weight.detach()
    if not bool(torch.isfinite(weight).all()):
        raise ModelError("it holds NaN or infinity; the checkpoint is damaged")
    return weight


def take_bias(linear: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Give a dense layer that has a bias the stored one, in `dtype`. Raises ModelError where that does not fit."""
    if linear.bias is None:
        return
    bias, shape = tensors.get("bias"), (linear.out_features,)
    if bias is None or tuple(bias.shape) != shape:
        found = "is missing" if bias is None else f"has {tuple(bias.shape)}"
        raise ModelError(f"its bias should have shape {shape}, and {found}")
    linear.bias = torch.nn.Parameter(bias.to(dtype), requires_grad=False)


def type_and_shape(tensor: Tensor) -> str:
    """As messages say it: 'float32 (4, 2)'."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
