"""Reads checkpoints into packed layers, and writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from polyquant.plugin import (
    LoadedModel,
    LoadRequest,
    checkpoints,
    is_linear,
    is_packed,
    module_of,
    quantized_modules,
    resolved_dtype,
)

from polyquant_compressed_tensors._kernels import Int4PackLinear
from polyquant_compressed_tensors._layers import CompressedLinear, packed_linear
from polyquant_compressed_tensors.formats import OWN, plain_format
from polyquant_compressed_tensors.options import CompressedTensorsOptions
from polyquant_compressed_tensors.planning import plan_layers, uses_int4pack

NOT_ROUNDED = "activations are not rounded: with kernel='packed' only the weights are what the checkpoint says"


def load(request: LoadRequest, config: CompressedTensorsOptions) -> LoadedModel:
    stored, wanted = request.source.stored_quantization, resolved_dtype(config)
    config = config.with_kernel(torch.device(request.device).type, wanted)
    own = {module_of(weight): config.of(weight) for weight in request.weights if is_linear(weight, config)}

    def make(name: str, linear: Any, tensors: dict[str, torch.Tensor]) -> CompressedLinear:
        plain = plain_format(stored, name)
        layer = packed_linear(linear, own[name], getattr(torch, wanted), tensors, plain=plain)
        return Int4PackLinear(layer) if uses_int4pack((layer.out_features, layer.in_features), own[name]) else layer

    names = quantized_modules(plan_layers(request.weights, config))
    model = checkpoints.read_layers(request, wanted, names, make)
    model.config.quantization_config = {**stored, OWN: config.own_fields()}
    kernels = dict.fromkeys(model.get_submodule(name).kernel for name in names)
    notes = [NOT_ROUNDED] if is_packed(config) and config.rounds_activations else []
    return LoadedModel(model=model, config=config, kernel=" and ".join(kernels), notes=notes)


def save(loaded: LoadedModel, out: Path) -> Path:
    """The tensors in the format they were read in, and the quantization_config with the compute dtype."""
    stored, tensors = dict(loaded.model.config.quantization_config), dict(loaded.model.state_dict())
    for name, module in loaded.model.named_modules():
        if isinstance(module, CompressedLinear):
            for key in module.state_dict():
                del tensors[f"{name}.{key}"]
            own = module.checkpoint_tensors(plain=plain_format(stored, name))
            tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
    return checkpoints.save(loaded, out, tensors, stored)
