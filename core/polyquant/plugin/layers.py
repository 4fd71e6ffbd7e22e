"""Quantized modules: how they are filled and described, their products with packed weights, and the gradients.

Imports torch.

Left to itself, autograd would keep each dequantized weight until the backward pass: a dense model again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from polyquant.errors import ModelError
from polyquant.loaded import LoadedModel
from polyquant.plugin.describe import Quantized, describe
from polyquant.plugin.parts import Part, layer_tensors, parts_of, require_parts

__all__ = [
    "PackedLinear",
    "Part",
    "Quantized",
    "bias_as_parameter",
    "describe",
    "differentiable",
    "fill_empty",
    "finite_weight",
    "frozen_for_adapters",
    "frozen_linear",
    "gptq_tensors",
    "layer_tensors",
    "needs_gradient",
    "parts_of",
    "prepare_for_training",
    "rows_at_a_time",
    "take_bias",
    "weight_rows",
]

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
        """linear: the layer whose place it takes; only its sizes are read. tensors: by name, a bias among them."""
        torch.nn.Module.__init__(self)  # nn.Linear's own would make a dense weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for name in ("weight", "bias"):
            self.register_parameter(name, None)
        for name, tensor in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        self.eval()

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in_features). Returns (..., out_features)."""
        return frozen_linear(input, lambda: [self.dequantize()], self.bias)

    def dequantize(self) -> Tensor:
        """The weight, (out_features, in_features)."""
        raise NotImplementedError


def fill_empty(module: Any, tensors: Mapping[str, Tensor], *, tied: Collection[str] = ()) -> None:
    """Assign `tensors` to the parameters and buffers of `module`, by their names in it.

    tied: names that stay empty. Raises ModelError where something else is left on the meta device, or a tensor fits
    nothing, has another shape, or integers in the place of floating point.
    """
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    empty = {name for name, tensor in own.items() if tensor.is_meta}
    if astray := sorted((empty - set(tied) - set(tensors)) | (set(tensors) - set(own))):
        named = ", ".join(astray[:3])
        raise ModelError(f"{len(astray)} tensors are missing or have no place in the model: {named}")
    for name, tensor in tensors.items():
        owner, _, short = name.rpartition(".")
        wanted = own[name]
        if wanted.shape != tensor.shape:
            raise ModelError(f"{name} has shape {tuple(tensor.shape)}, {tuple(wanted.shape)} was expected")
        if wanted.is_floating_point() and not tensor.is_floating_point():
            raise ModelError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, a floating point was expected")
        is_parameter = isinstance(wanted, torch.nn.Parameter)
        value = torch.nn.Parameter(tensor, wanted.requires_grad) if is_parameter else tensor
        setattr(module.get_submodule(owner), short, value)


def bias_as_parameter(layer: Any) -> None:
    """Make the bias a parameter, which is seen and moved like any other; libraries keep it as a buffer or attribute."""
    bias = layer.bias
    if bias is not None:
        del layer.bias
        layer.register_parameter("bias", torch.nn.Parameter(bias.detach(), requires_grad=False))


def gptq_tensors(
    linear: Any, tensors: Mapping[str, Tensor], group_size: int, *, in_order: bool = True
) -> dict[str, Tensor]:
    """The tensors of a GPTQ layer, with each column's group, and without the bias of zeros that auto-gptq writes.

    linear: the dense module, which says whether there is a bias. group_size: -1 is all of in_features.
    in_order: whether the columns are in their order where no `g_idx` says which group each belongs to.
    Raises ModelError where a column belongs to a group that there is not: kernels read its scale beyond the last one.
    """
    whole = dict(tensors)
    if linear.bias is None and "bias" in whole and not whole["bias"].any():
        del whole["bias"]
    size = linear.in_features if group_size == -1 else group_size
    if in_order or group_size == -1:
        whole.setdefault("g_idx", torch.arange(linear.in_features, dtype=torch.int32) // size)
    group_of_column = Part((linear.in_features,), "int32", 0, ceil(linear.in_features / size) - 1)
    own = {name: tensor for name, tensor in whole.items() if name == "g_idx"}
    require_parts((linear.out_features, linear.in_features), own, {"g_idx": group_of_column})
    return whole


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
