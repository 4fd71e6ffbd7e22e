"""Quantizes layer by layer, and reads and writes checkpoints with the library's names of tensors.

Not through transformers: on a CPU the library gives tensors whose shapes 5.23 refuses (an amax without dimensions,
weights padded to 128 rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from polyquant.plugin import (
    LoadedModel,
    LoadRequest,
    WeightInfo,
    checkpoints,
    dense_linears,
    is_packed,
    module_of,
    quantized_modules,
    resolved_dtype,
)

from polyquant_fouroversix._layers import kernel, linear_from_tensors, quantize_linear, stored_tensors
from polyquant_fouroversix._modules import FouroversixLinear
from polyquant_fouroversix.options import FouroversixOptions
from polyquant_fouroversix.planning import STORED_NAMES, plan_layers

CODES = STORED_NAMES["weight"]


def load(request: LoadRequest, config: FouroversixOptions) -> LoadedModel:
    weights, source, dtype, notes = request.weights, request.source, resolved_dtype(config), list[str]()
    if source.stored_quantization:
        config, notes = checkpoints.as_packed(config, request, (CODES,))
    if is_packed(config) and config.quantize_activations:
        notes = [*notes, "activations are not rounded to the format: kernel='packed' multiplies with weights alone so"]
    names = quantized_modules(plan_layers(weights, config))

    def read(_: str, linear: Any, tensors: dict[str, torch.Tensor]) -> FouroversixLinear:
        return linear_from_tensors(linear, config, getattr(torch, dtype), tensors)

    if source.stored_quantization:
        model = checkpoints.read_layers(request, dtype, names, read)
    else:
        model = checkpoints.quantize_layers(
            request, dtype, names, lambda _, linear: quantize_linear(linear, config), by_rows=True
        )
    model.config.quantization_config = config.to_stored() | {"modules_to_not_convert": _dense(weights, config)}
    return LoadedModel(model=model, config=config, kernel=kernel(config), notes=notes)


def save(loaded: LoadedModel, out: Path) -> Path:
    layers = {name: module for name, module in loaded.model.named_modules() if isinstance(module, FouroversixLinear)}
    tensors = {
        name: tensor
        for name, tensor in loaded.model.state_dict().items()
        if name.rpartition(".")[0] not in layers or name.endswith(".bias")
    }
    for name, layer in layers.items():
        tensors |= {f"{name}.{short}": tensor for short, tensor in stored_tensors(layer).items()}
    return checkpoints.save(loaded, out, tensors)


def _dense(weights: Sequence[WeightInfo], config: FouroversixOptions) -> list[str]:
    """Linear modules that stay dense, on request or by default: the library itself knows no defaults."""
    tied = [module_of(weight) for weight in weights if weight.tied_to]
    return list(dict.fromkeys([*config.skip, *dense_linears(weights, config), *tied]))
