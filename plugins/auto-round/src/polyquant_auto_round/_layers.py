"""How AutoRound's modules store their weights after loading."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from polyquant.plugin import LayerInfo, LoadedModel
from polyquant.plugin.layers import Quantized, describe, differentiable, frozen_for_adapters

from polyquant_auto_round._kernels import is_fast, multiply, name


def describe_layers(model: Any) -> list[LayerInfo]:
    return describe(model, _quantized, skipped=model.config.quantization_config["skip_modules"])


def prepare_for_training(loaded: LoadedModel) -> Any:
    """Freeze, recompute activations in the backward pass, and let gradients pass auto-round-lib's matmul."""
    for module in loaded.model.modules():
        if hasattr(module, "polyquant_scheme") and is_fast(module.bits):
            module.forward = partial(_forward, module)
    return frozen_for_adapters(loaded.model)


def _forward(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    rows = differentiable(partial(multiply, layer), inputs.reshape(-1, layer.infeatures))
    outputs = rows.reshape(*inputs.shape[:-1], layer.outfeatures)
    return outputs + layer.bias.to(outputs.dtype) if layer.bias.numel() else outputs


def _quantized(module_name: str, module: Any) -> Quantized | None:
    scheme = getattr(module, "polyquant_scheme", "")
    if not scheme:
        return None
    return Quantized((module.outfeatures, module.infeatures), module.bits, scheme, name(module.bits))
