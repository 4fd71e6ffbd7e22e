"""How bitsandbytes' modules store their weights, and what they need for training."""

from __future__ import annotations

from typing import Any

from bitsandbytes import nn as bnb
from polyquant.plugin import LayerInfo, LoadedModel
from polyquant.plugin.layers import Quantized, describe

from polyquant_bitsandbytes._library import kernel
from polyquant_bitsandbytes._load import linear_4bit, read_again, repacked


def describe_layers(model: Any) -> list[LayerInfo]:
    config = getattr(model.config, "quantization_config", None)
    skipped = getattr(config, "llm_int8_skip_modules", None) or ()
    return describe(model, _quantized, skipped=skipped)


def prepare_for_training(loaded: LoadedModel) -> Any:
    """Freeze, and let no forward pass repack weights: no gradient passes through those that are."""
    from peft import prepare_model_for_kbit_training

    if repacked(loaded.model):
        exact = dict(read_again(loaded).named_modules())
        for name, module in loaded.model.named_modules():
            if isinstance(module, bnb.Linear4bit):
                module.weight, module.quant_state = exact[name].weight, exact[name].weight.quant_state
    for module in linear_4bit(loaded.model):
        module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(loaded.model, gradient_checkpointing_kwargs={"use_reentrant": False})


def _quantized(name: str, module: Any) -> Quantized | None:
    """A module whose weight is packed; one that offloading or tying has left dense is not."""
    shape = (getattr(module, "out_features", 0), getattr(module, "in_features", 0))
    if isinstance(module, bnb.Linear4bit) and getattr(module.weight, "quant_state", None) is not None:
        return Quantized(shape, 4, module.weight.quant_state.quant_type, kernel(module.weight.device.type))
    if isinstance(module, bnb.Linear8bitLt) and module.weight.dtype.itemsize == 1:
        return Quantized(shape, 8, "int8", kernel(module.weight.device.type))
    return None
