"""How FP8 modules store their weights, and how they are made: from a dense layer, or from a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from polyquant.errors import ModelError
from polyquant.plugin import LayerInfo
from polyquant.plugin.layers import (
    Quantized,
    describe,
    finite_weight,
    prepare_for_training,
    take_bias,
    type_and_shape,
)
from torch import Tensor

from polyquant_fp8._decode import E4M3, has_nan, quantize
from polyquant_fp8._modules import KERNEL, Fp8Linear
from polyquant_fp8.options import Fp8Options
from polyquant_fp8.planning import SCHEME, scale_shape

__all__ = ["prepare_for_training"]  # freezing is all that adapters need
E8M0 = torch.float8_e8m0fnu


def describe_layers(model: Any) -> list[LayerInfo]:
    return describe(model, _quantized, skipped=model.config.quantization_config["modules_to_not_convert"] or ())


def quantized_linear(linear: Any, config: Fp8Options) -> Fp8Linear:
    """A layer that takes the place of `linear`. Raises ModelError where that holds NaN or infinity."""
    weight, scales = quantize(finite_weight(linear), config.block, powers_of_two=config.scale_fmt == "ue8m0")
    return Fp8Linear(linear, weight, scales, config.block).eval()


def linear_from_tensors(
    linear: Any, config: Fp8Options, dtype: torch.dtype, tensors: Mapping[str, Tensor]
) -> Fp8Linear:
    """A layer from weight, weight_scale_inv, bias and activation_scale. Raises ModelError where they are wrong."""
    expected = ["weight", "weight_scale_inv"] + (["bias"] if linear.bias is not None else [])
    expected += ["activation_scale"] if config.activation_scheme == "static" else []
    if set(expected) != set(tensors):
        raise ModelError(f"it has {', '.join(tensors)}, where {', '.join(expected)} were expected")
    shape = (linear.out_features, linear.in_features)
    weight, scales = tensors["weight"], _scales(tensors["weight_scale_inv"], config)
    if weight.dtype != E4M3 or tuple(weight.shape) != shape:
        raise ModelError(f"weight should be float8_e4m3fn {shape}, and is {type_and_shape(weight)}")
    grid = scale_shape(shape, config)
    if scales is None or (tuple(scales.shape) != grid and not (config.block is None and scales.numel() == 1)):
        wanted = "float8_e8m0fnu" if config.scale_fmt == "ue8m0" else "float"
        found = type_and_shape(tensors["weight_scale_inv"])
        raise ModelError(f"weight_scale_inv should be {wanted} {grid}, and is {found}")
    if has_nan(weight) or not bool(torch.isfinite(scales.float()).all()):
        raise ModelError("it holds NaN or infinity; the checkpoint is damaged")
    take_bias(linear, tensors, dtype)
    activation = tensors["activation_scale"].float().reshape(()) if config.activation_scheme == "static" else None
    return Fp8Linear(linear, weight, scales.reshape(grid), config.block, activation).eval()


def _scales(stored: Tensor, config: Fp8Options) -> Tensor | None:
    """Scales as they are kept: e8m0, also from bytes, or float32; None for another type."""
    if config.scale_fmt == "ue8m0":
        return stored.view(E8M0) if stored.dtype in (torch.uint8, E8M0) else None
    return stored.float() if stored.dtype in (torch.float32, torch.bfloat16, torch.float16) else None


def _quantized(name: str, module: Any) -> Quantized | None:
    if not isinstance(module, Fp8Linear):
        return None
    return Quantized((module.out_features, module.in_features), 8, SCHEME, KERNEL)
