"""Reads and writes checkpoints itself.

transformers 5.23 unpacks autobitlinear weights while loading, and compiles the functions of its layers on first use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from polyquant.memory.weights import list_weights
from polyquant.models import hf
from polyquant.plugin import LoadedModel, LoadRequest, checkpoints, layers, resolved_dtype

from polyquant_bitnet._layers import linear_from_tensors
from polyquant_bitnet.modules import FLOAT, INT8
from polyquant_bitnet.options import BitnetOptions
from polyquant_bitnet.planning import plan_layers, with_full_names

ONLINE = "the checkpoint holds dense weights to be rounded in each pass (online): they were rounded once and packed"
SCALED_BIAS = "biases are multiplied by their layer's scale, as transformers reads autobitlinear checkpoints"


def load(request: LoadRequest, config: BitnetOptions) -> LoadedModel:
    dtype = resolved_dtype(config)
    weights = list_weights(hf.skeleton(request.source, dtype, trust_remote_code=request.trust_remote_code))
    config = with_full_names(weights, config)
    names = [plan.name.rpartition(".")[0] for plan in plan_layers(weights, config) if plan.quantized]
    biases = {f"{name}.bias" for name in names} & {weight.name for weight in weights}
    if config.quantization_mode == "online":
        notes = [ONLINE]
    else:
        notes = [SCALED_BIAS] if biases and config.linear_class == "autobitlinear" else []
    tokenizer = checkpoints.load_tokenizer(request.source, trust_remote_code=request.trust_remote_code)
    model = _read(request, config, names)
    config = msgspec.structs.replace(config, quantization_mode="offline")
    model.config.quantization_config = config.stored()
    kernel = INT8 if request.device == "cpu" else FLOAT
    return LoadedModel(model=model, tokenizer=tokenizer, config=config, kernel=kernel, notes=notes)


def save(loaded: LoadedModel, out: Path) -> Path:
    """Under the names transformers gives them: the packed weight and weight_scale of each layer."""
    tensors = {name: tensor.detach() for name, tensor in loaded.model.state_dict().items()}
    return checkpoints.save(loaded, out, tensors, dict(loaded.model.config.quantization_config))


def prepare_for_training(loaded: LoadedModel) -> Any:
    """Freeze, and recompute activations in the backward pass; gradients pass the rounding of activations unchanged."""
    return layers.frozen_for_adapters(loaded.model)


def _read(request: LoadRequest, config: BitnetOptions, names: list[str]) -> Any:
    dtype = resolved_dtype(config)

    def make(name: str, module: Any, tensors: dict[str, torch.Tensor]) -> Any:
        return linear_from_tensors(name, module, config, getattr(torch, dtype), tensors)

    return checkpoints.read_layers(request, dtype, names, make, owner=lambda module: module.removesuffix(".rms_norm"))
