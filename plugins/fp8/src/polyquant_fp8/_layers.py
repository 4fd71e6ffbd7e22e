"""How FP8 modules store their weights, and how they are made: from a dense layer, or from a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from polyquant.errors import ModelError
from polyquant.plugin import LayerInfo
from polyquant.plugin.layers import Quantized, describe
from torch import Tensor

from polyquant_fp8.blocks import E4M3, has_nan, quantize
from polyquant_fp8.modules import KERNEL, Fp8Linear
from polyquant_fp8.options import Fp8Options
from polyquant_fp8.planning import SCHEME, scale_shape

E8M0 = torch.float8_e8m0fnu


def describe_layers(model: Any) -> list[LayerInfo]:
    return describe(model, _quantized, skipped=model.config.quantization_config["modules_to_not_convert"] or ())


def quantized_linear(name: str, linear: Any, config: Fp8Options, dtype: torch.dtype) -> Fp8Linear:
    """A layer that takes the place of `linear`. Raises ModelError where that holds NaN or infinity."""
    weight = linear.weight.detach()
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(f"{name} holds NaN or infinity and cannot be quantized; the checkpoint is damaged")
    packed, scales = quantize(weight, config.block, powers_of_two=config.scale_fmt == "ue8m0")
    return Fp8Linear(linear, packed, scales, config.block).eval()


def linear_from_tensors(
    name: str, linear: Any, config: Fp8Options, dtype: torch.dtype, tensors: Mapping[str, Tensor]
) -> Fp8Linear:
    """A layer from weight, weight_scale_inv, bias and activation_scale. Raises ModelError where they are wrong."""
    expected = ["weight", "weight_scale_inv"] + (["bias"] if linear.bias is not None else [])
    expected += ["activation_scale"] if config.activation_scheme == "static" else []
    if set(expected) != set(tensors):
        raise ModelError(f"{name} has {', '.join(tensors)}, where {', '.join(expected)} were expected")
    shape = (linear.out_features, linear.in_features)
    weight, scales = tensors["weight"], _scales(tensors["weight_scale_inv"], config)
    if weight.dtype != E4M3 or tuple(weight.shape) != shape:
        raise ModelError(f"{name} should be float8_e4m3fn {shape}, and is {_kind(weight)}")
    grid = scale_shape(shape, config)
    if scales is None or (tuple(scales.shape) != grid and not (config.block is None and scales.numel() == 1)):
        wanted = "float8_e8m0fnu" if config.scale_fmt == "ue8m0" else "float"
        found = _kind(tensors["weight_scale_inv"])
        raise ModelError(f"weight_scale_inv of {name} should be {wanted} {grid}, and is {found}")
    if has_nan(weight) or not bool(torch.isfinite(scales.float()).all()):
        raise ModelError(f"{name} holds NaN or infinity; the checkpoint is damaged")
    if linear.bias is not None:
        if tuple(tensors["bias"].shape) != shape[:1]:
            raise ModelError(f"bias of {name} should have shape {shape[:1]}, and has {tuple(tensors['bias'].shape)}")
        linear.bias = torch.nn.Parameter(tensors["bias"].to(dtype), requires_grad=False)
    activation = tensors["activation_scale"].float().reshape(()) if config.activation_scheme == "static" else None
    return Fp8Linear(linear, weight, scales.reshape(grid), config.block, activation).eval()


def _scales(stored: Tensor, config: Fp8Options) -> Tensor | None:
    """Scales as they are kept: e8m0, also from bytes, or float32; None for another type."""
    if config.scale_fmt == "ue8m0":
        return stored.view(E8M0) if stored.dtype in (torch.uint8, E8M0) else None
    return stored.float() if stored.dtype in (torch.float32, torch.bfloat16, torch.float16) else None


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _quantized(name: str, module: Any) -> Quantized | None:
    if not isinstance(module, Fp8Linear):
        return None
    return Quantized((module.out_features, module.in_features), 8, SCHEME, KERNEL)
