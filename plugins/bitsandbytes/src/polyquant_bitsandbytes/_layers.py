"""How bitsandbytes' modules store their weights."""

from __future__ import annotations

from typing import Any

from bitsandbytes import nn as bnb
from polyquant.plugin import LayerInfo
from polyquant.plugin.layers import Quantized, describe

from polyquant_bitsandbytes._load import kernel


def describe_layers(model: Any) -> list[LayerInfo]:
    config = getattr(model.config, "quantization_config", None)
    skipped = getattr(config, "llm_int8_skip_modules", None) or ()
    return describe(model, _quantized, skipped=skipped)


def _quantized(name: str, module: Any) -> Quantized | None:
    """A module whose weight is packed; one that offloading or tying has left dense is not."""
    shape = (getattr(module, "out_features", 0), getattr(module, "in_features", 0))
    if isinstance(module, bnb.Linear4bit) and getattr(module.weight, "quant_state", None) is not None:
        return Quantized(shape, 4, module.weight.quant_state.quant_type, kernel(module.weight.device.type))
    if isinstance(module, bnb.Linear8bitLt) and module.weight.dtype.itemsize == 1:
        return Quantized(shape, 8, "int8", kernel(module.weight.device.type))
    return None
