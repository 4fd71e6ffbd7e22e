"""Reads and writes checkpoints itself.

transformers 5.23 unpacks autobitlinear weights while loading, and compiles the functions of its layers on first use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from polyquant.plugin import LoadedModel, LoadRequest, checkpoints, quantized_modules, resolved_dtype

from polyquant_bitnet._layers import linear_from_tensors
from polyquant_bitnet._modules import FLOAT, INT8
from polyquant_bitnet.options import BitnetOptions
from polyquant_bitnet.planning import plan_layers, with_full_names

ONLINE = "the checkpoint holds dense weights to be rounded in each pass (online): they were rounded once and packed"
SCALED_BIAS = "biases are multiplied by their layer's scale, as transformers reads autobitlinear checkpoints"


def load(request: LoadRequest, config: BitnetOptions) -> LoadedModel:
    dtype = resolved_dtype(config)
    config = with_full_names(request.weights, config)
    names = quantized_modules(plan_layers(request.weights, config))

    def read(name: str, linear: Any, tensors: dict[str, torch.Tensor]) -> Any:
        return linear_from_tensors(linear, config, getattr(torch, dtype), tensors)

    model = checkpoints.read_layers(request, dtype, names, read, owner=lambda module: module.removesuffix(".rms_norm"))
    biases = {f"{name}.bias" for name in names} & {weight.name for weight in request.weights}
    if config.quantization_mode == "online":
        notes = [ONLINE]
    else:
        notes = [SCALED_BIAS] if biases and config.linear_class == "autobitlinear" else []
    offline = msgspec.structs.replace(config, quantization_mode="offline")
    return LoadedModel(model=model, config=offline, kernel=INT8 if request.device == "cpu" else FLOAT, notes=notes)


def save(loaded: LoadedModel, out: Path) -> Path:
    """Under the names transformers gives them: the packed weight and weight_scale of each layer."""
    return checkpoints.save(loaded, out)
