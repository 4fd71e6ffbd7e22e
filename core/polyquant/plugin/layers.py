"""Quantized modules: how they are filled and described, and what they need for training. Imports torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import ceil
from typing import Any

import torch
from torch import Tensor

from polyquant.errors import ModelError
from polyquant.loaded import LoadedModel
from polyquant.packed_weights.bands import Rows, in_bands, largest
from polyquant.packed_weights.codes import WeightCodes, fits
from polyquant.packed_weights.experts import ExpertStack, LinearExperts
from polyquant.packed_weights.frozen import (
    CHUNK_WEIGHTS,
    PackedLinear,
    differentiable,
    frozen_linear,
    needs_gradient,
    rows_at_a_time,
    weight_rows,
)
from polyquant.packed_weights.weight import PackedWeight, pack_weight
from polyquant.plugin.describe import Quantized, describe
from polyquant.plugin.parts import Part, is_finite, layer_tensors, parts_of, require_finite, require_parts
from polyquant.plugin.tensors import STORED_ROWS

__all__ = [
    "CHUNK_WEIGHTS",
    "ExpertStack",
    "LinearExperts",
    "PackedLinear",
    "PackedWeight",
    "Part",
    "Quantized",
    "Rows",
    "WeightCodes",
    "assign",
    "bias_as_parameter",
    "describe",
    "differentiable",
    "fill_empty",
    "finite_weight",
    "fits",
    "frozen_for_adapters",
    "frozen_linear",
    "gptq_tensors",
    "in_bands",
    "is_finite",
    "largest",
    "layer_tensors",
    "needs_gradient",
    "pack_weight",
    "parts_of",
    "prepare_for_training",
    "rows_at_a_time",
    "rows_of",
    "take_bias",
    "weight_rows",
]


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
        assign(module, name, tensor)


def assign(module: Any, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of the parameter or buffer of `module` of that name. Raises ModelError for a misfit."""
    owner, _, short = name.rpartition(".")
    home = module.get_submodule(owner)
    wanted = getattr(home, short)
    if wanted.shape != tensor.shape:
        raise ModelError(f"{name} has shape {tuple(tensor.shape)}, {tuple(wanted.shape)} was expected")
    if wanted.is_floating_point() and not tensor.is_floating_point():
        raise ModelError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, a floating point was expected")
    is_parameter = isinstance(wanted, torch.nn.Parameter)
    setattr(home, short, torch.nn.Parameter(tensor, wanted.requires_grad) if is_parameter else tensor)


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
    return require_finite(linear.weight.detach())


def rows_of(dense: Any) -> Rows:
    """The weight of a dense layer or a table, to be quantized by `in_bands`: while a checkpoint is read its rows come
    from the file when they are asked for (`checkpoints.quantize_layers` with `by_rows`).

    Raises ModelError, here or where rows are asked for, as `finite_weight` does.
    """
    stored: Rows | None = vars(dense).get(STORED_ROWS)
    return finite_weight(dense) if stored is None else stored


def take_bias(linear: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Give a dense layer that has a bias the stored one, in `dtype`. Raises ModelError where that does not fit."""
    if linear.bias is None:
        return
    bias, shape = tensors.get("bias"), (linear.out_features,)
    if bias is None or tuple(bias.shape) != shape:
        found = "is missing" if bias is None else f"has {tuple(bias.shape)}"
        raise ModelError(f"its bias should have shape {shape}, and {found}")
    linear.bias = torch.nn.Parameter(bias.to(dtype), requires_grad=False)
