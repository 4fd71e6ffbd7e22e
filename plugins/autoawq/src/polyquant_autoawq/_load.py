"""Reads AWQ checkpoints into AutoAWQ's layers: every tensor is checked by name and shape on the way."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from polyquant.plugin import LoadedModel, LoadRequest, checkpoints, is_packed, quantized_modules, resolved_dtype
from polyquant.plugin.layers import bias_as_parameter, fill_empty, layer_tensors, parts_of

from polyquant_autoawq._layers import empty_layer, kernel
from polyquant_autoawq.options import AutoawqOptions
from polyquant_autoawq.planning import plan_layers

PARTS = ("qweight", "qzeros", "scales")
SLOW = "Using naive"  # the library's warning, once a process; `kernel` says the same


def load(request: LoadRequest, config: AutoawqOptions) -> LoadedModel:
    wanted = resolved_dtype(config)
    kept = {"bias": getattr(torch, wanted)}
    if not is_packed(config):  # in which every layer has a place
        kept["scales"] = torch.float16  # the library multiplies in it
    config, notes = checkpoints.as_packed(config, request, PARTS)
    names = sorted(quantized_modules(plan_layers(request.weights, config)))

    def read(name: str, linear: Any, tensors: dict[str, torch.Tensor]) -> Any:
        layer = empty_layer(linear, config)
        whole = layer_tensors(linear, tensors, parts_of(layer))
        fill_empty(layer, {part: tensor.to(kept.get(part, tensor.dtype)) for part, tensor in whole.items()})
        bias_as_parameter(layer)
        return layer

    model = checkpoints.read_layers(request, wanted, names, read)
    if not is_packed(config):
        _warm(model.get_submodule(names[0]))
    return LoadedModel(model=model, config=config, kernel=kernel(request.device), notes=notes)


def _warm(layer: Any) -> None:
    """One pass of one layer, in which the library has its warning."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.filterwarnings("ignore", message=SLOW)
        layer(torch.zeros(1, 1, layer.in_features, dtype=torch.float16, device=layer.qweight.device))
