"""How HQQ's modules store their weights, and how they are made and read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hqq.core.quantize import HQQLinear, Quantizer
from polyquant.errors import Misfit
from polyquant.plugin import LayerInfo, resolved_dtype
from polyquant.plugin.layers import (
    PackedWeight,
    Quantized,
    WeightCodes,
    bias_as_parameter,
    describe,
    layer_tensors,
    pack_weight,
    prepare_for_training,
)
from polyquant.plugin.packing import unsigned

from polyquant_hqq._quantize import searching_in_bands
from polyquant_hqq.options import HqqOptions
from polyquant_hqq.planning import KINDS, packed_shape

__all__ = ["pack", "prepare_for_training", "unpack"]  # freezing is all that adapters need
KERNEL = "hqq dequantize and torch matmul"
HALF = 128  # what codes of 8 bits are made less by: the packed layout has them signed


def describe_layers(model: Any) -> list[LayerInfo]:
    return describe(model, _quantized, skipped=model.config.quantization_config["skip_modules"])


def quantize_linear(linear: torch.nn.Linear, config: HqqOptions) -> HQQLinear:
    """A layer that takes the place of `linear`, whose own weight is let go."""
    dtype = getattr(torch, resolved_dtype(config))
    with searching_in_bands():
        layer = HQQLinear(linear, config.quantize_config(), compute_dtype=dtype, device=str(linear.weight.device))
    bias_as_parameter(layer)
    return layer.eval()


def linear_from_tensors(
    linear: Any, config: HqqOptions, dtype: torch.dtype, tensors: Mapping[str, torch.Tensor]
) -> HQQLinear:
    """A layer from the stored W_q, scale, zero and bias.

    hqq's own reading evaluates text of the checkpoint as Python, so what is not a weight comes from the config.
    Raises ModelError where a tensor is missing or wrong.
    """
    shape = (linear.out_features, linear.in_features)
    groups = linear.out_features * linear.in_features // config.group_size
    group_shape = (groups, 1) if config.axis == 1 else (1, groups)
    codes = (packed_shape(shape, config), "int32" if config.bits == 3 else "uint8")
    expected = {"W_q": codes, "scale": (group_shape, "float"), "zero": (group_shape, "float")}
    own = {name: tensor for name, tensor in tensors.items() if name in (*expected, "bias")}
    tensors = layer_tensors(linear, own, expected)
    layer = HQQLinear(
        None, config.quantize_config(), compute_dtype=dtype, device=str(tensors["W_q"].device), initialize=False
    )
    layer.W_q = torch.nn.Parameter(tensors["W_q"], requires_grad=False)
    packing = Quantizer.bit_to_packing[config.bits]
    layer.meta = {
        "nbits": config.bits, "group_size": config.group_size, "shape": torch.Size(shape), "axis": config.axis,
        "scale": tensors["scale"].to(dtype), "zero": tensors["zero"].to(dtype), "packing": packing,
        "unpack_view_dtype": Quantizer.unpack_view_dtype[packing], "view_as_float": False,
        "quant_scale": False, "quant_zero": False, "compute_dtype": dtype,
    }  # fmt: skip
    layer.out_features, layer.in_features = shape
    layer.bias = tensors["bias"].to(dtype) if linear.bias is not None else None
    layer.in_gpu = layer.ready = True
    bias_as_parameter(layer)
    return layer.eval()


def pack(module: HQQLinear) -> PackedWeight:
    """(code - zero) * scale as code * scale + minimum, whose one rounding is that of float32."""
    meta, shape = module.meta, (module.out_features, module.in_features)
    codes = Quantizer.unpack[meta["packing"]](module.W_q.detach(), dtype=torch.uint8).view(shape)
    scales, least = (meta[name].detach().view(shape[0], -1) for name in ("scale", "zero"))
    least = -least.double()
    if meta["nbits"] == 8:
        codes, least = (codes ^ HALF).view(torch.int8), least + HALF
    return pack_weight(codes, scales, meta["group_size"], minima=(least * scales.double()).float())


def unpack(weight: WeightCodes, config: HqqOptions) -> dict[str, torch.Tensor]:
    """Zero points that are no integers stand for minima: in float32, to its rounding."""
    if config.axis == 0 or config.bits not in KINDS:
        raise Misfit(
            "bits", f"axis {config.axis} and {config.bits} bits are asked, and codes of rows in 4 or 8 there are"
        )
    held = weight.integers(config.bits).in_order().in_groups(config.group_size)
    scales = held.scales
    zeros = -(held.minima.double() / scales.double()).float() if held.zeros is None else held.zeros.to(scales.dtype)
    codes = held.codes if config.bits == 4 else unsigned(held.codes)
    if config.bits == 8:
        zeros = zeros + HALF
    packed = Quantizer.pack[Quantizer.bit_to_packing[config.bits]](codes.reshape(-1, config.group_size))
    return {"W_q": packed, "scale": scales.reshape(-1, 1), "zero": zeros.reshape(-1, 1)}


def _quantized(name: str, module: Any) -> Quantized | None:
    if not isinstance(module, HQQLinear):
        return None
    bits = module.meta["nbits"]
    return Quantized((module.out_features, module.in_features), bits, f"hqq{bits}", KERNEL)
