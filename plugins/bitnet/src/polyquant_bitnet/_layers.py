"""How ternary modules store their weights, and how they are made from a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from polyquant.errors import ModelError
from polyquant.plugin import LayerInfo
from polyquant.plugin.layers import Quantized, describe
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from polyquant_bitnet.modules import TernaryLinear, pack, ternarize
from polyquant_bitnet.options import BitnetOptions
from polyquant_bitnet.planning import SCHEME


def describe_layers(model: Any) -> list[LayerInfo]:
    return describe(model, _quantized, skipped=model.config.quantization_config["modules_to_not_convert"] or ())


def linear_from_tensors(
    name: str, linear: Any, config: BitnetOptions, dtype: torch.dtype, tensors: Mapping[str, Tensor]
) -> TernaryLinear:
    """A layer from weight, weight_scale, bias and rms_norm.weight. Raises ModelError where they are wrong."""
    stored = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    expected = ["weight"] if config.quantization_mode == "online" else ["weight", "weight_scale"]
    expected += ["bias"] if linear.bias is not None else []
    expected += ["rms_norm.weight"] if config.use_rms_norm else []
    if set(expected) != set(stored):
        raise ModelError(f"{name} has {', '.join(stored) or 'no tensors'}, where {', '.join(expected)} were expected")
    if config.quantization_mode == "online":
        stored |= _packed(name, linear, tensors["weight"], dtype)
        if linear.bias is not None:
            stored["bias"] = stored["bias"] / stored["weight_scale"]  # it is multiplied again, and online it is not
    norm = _norm(name, linear.in_features, config, stored["rms_norm.weight"]) if config.use_rms_norm else None
    layer = TernaryLinear(linear, divides=config.linear_class == "bitlinear", norm=norm)
    layer.assign(name, stored["weight"], stored["weight_scale"], stored.get("bias"))
    return layer.eval()


def _packed(name: str, linear: Any, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The dense weight of an online checkpoint, as transformers rounds it in each forward pass."""
    shape = (linear.out_features, linear.in_features)
    if not weight.is_floating_point() or tuple(weight.shape) != shape:
        kind = f"{str(weight.dtype).removeprefix('torch.')} {tuple(weight.shape)}"
        raise ModelError(f"{name} should be a dense weight {shape} (quantization_mode 'online'), and is {kind}")
    ternary, scale = ternarize(weight)
    return {"weight": pack(ternary), "weight_scale": scale.to(dtype)}


def _norm(name: str, size: int, config: BitnetOptions, weight: Tensor) -> LlamaRMSNorm:
    if tuple(weight.shape) != (size,):
        raise ModelError(f"rms_norm.weight of {name} should have shape ({size},), and has {tuple(weight.shape)}")
    with torch.device("meta"):
        norm = LlamaRMSNorm(size, eps=config.rms_norm_eps)
    norm.weight = torch.nn.Parameter(weight)
    return norm


def _quantized(name: str, module: Any) -> Quantized | None:
    if not isinstance(module, TernaryLinear):
        return None
    return Quantized((module.out_features, module.in_features), 2, SCHEME, module.kernel)
