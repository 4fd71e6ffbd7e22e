"""How ternary modules store their weights, and how they are made from a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from polyquant.plugin import LayerInfo
from polyquant.plugin.layers import Quantized, describe, layer_tensors, prepare_for_training
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from polyquant_bitnet._modules import TernaryLinear, pack, ternarize
from polyquant_bitnet.options import BitnetOptions
from polyquant_bitnet.planning import PACKED, SCHEME

__all__ = ["prepare_for_training"]  # freezing is all that adapters need: gradients pass the rounding of activations


def describe_layers(model: Any) -> list[LayerInfo]:
    return describe(model, _quantized, skipped=model.config.quantization_config["modules_to_not_convert"] or ())


def linear_from_tensors(
    linear: Any, config: BitnetOptions, dtype: torch.dtype, tensors: Mapping[str, Tensor]
) -> TernaryLinear:
    """A layer from weight, weight_scale, bias and rms_norm.weight. Raises ModelError where they are wrong."""
    rows, columns = linear.out_features, linear.in_features
    online = config.quantization_mode == "online"
    expected: dict[str, tuple[tuple[int, ...], str]] = {"weight": ((rows // PACKED, columns), "uint8")}
    expected = {"weight": ((rows, columns), "float")} if online else expected | {"weight_scale": ((1,), "float")}
    if config.use_rms_norm:
        expected["rms_norm.weight"] = ((columns,), "float")
    found = layer_tensors(linear, tensors, expected)
    stored = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in found.items()}
    if online:  # rounded as transformers does in each forward pass
        ternary, scale = ternarize(found["weight"])
        stored |= {"weight": pack(ternary), "weight_scale": scale.to(dtype)}
        if "bias" in stored:
            stored["bias"] = stored["bias"] / stored["weight_scale"]  # it is multiplied again, and online it is not
    norm = _norm(columns, config, stored["rms_norm.weight"]) if config.use_rms_norm else None
    layer = TernaryLinear(linear, divides=config.linear_class == "bitlinear", norm=norm)
    layer.assign(stored["weight"], stored["weight_scale"], stored.get("bias"))
    return layer.eval()


def _norm(size: int, config: BitnetOptions, weight: Tensor) -> LlamaRMSNorm:
    with torch.device("meta"):
        norm = LlamaRMSNorm(size, eps=config.rms_norm_eps)
    norm.weight = torch.nn.Parameter(weight)
    return norm


def _quantized(name: str, module: Any) -> Quantized | None:
    if not isinstance(module, TernaryLinear):
        return None
    return Quantized((module.out_features, module.in_features), 2, SCHEME, module.kernel)
