"""Reads GPTQ checkpoints into auto-gptq's layers: every tensor is checked by name and shape on the way."""

from __future__ import annotations

from typing import Any

import torch
from polyquant.plugin import (
    LoadedModel,
    LoadRequest,
    checkpoints,
    quantized_modules,
    repacked_modules,
    resolved_dtype,
)
from polyquant.plugin.layers import bias_as_parameter, fill_empty, gptq_tensors, layer_tensors, parts_of

from polyquant_autogptq._layers import empty_layer, kernel
from polyquant_autogptq.options import AutogptqOptions
from polyquant_autogptq.planning import plan_layers

PARTS = ("qweight", "qzeros", "scales", "g_idx")


def load(request: LoadRequest, config: AutogptqOptions) -> LoadedModel:
    wanted = resolved_dtype(config)
    dtype = getattr(torch, wanted)
    kept = {"scales": dtype, "bias": dtype}  # the library multiplies in the compute dtype
    config, notes = checkpoints.as_packed(config, request, PARTS)
    plans = plan_layers(request.weights, config)
    names = sorted(quantized_modules(plans))
    repacked = repacked_modules(plans, config)

    def read(name: str, linear: Any, tensors: dict[str, torch.Tensor]) -> Any:
        layer = empty_layer(linear, config, dtype)
        own = gptq_tensors(linear, tensors, config.group_size, in_order=not config.desc_act)
        whole = layer_tensors(linear, own, parts_of(layer))
        own = {part: tensor.to(kept.get(part, tensor.dtype)) for part, tensor in whole.items()}
        fill_empty(layer, own | {"scales": whole["scales"]} if name in repacked else own)
        bias_as_parameter(layer)
        return layer

    model = checkpoints.read_layers(request, wanted, names, read)
    packed = [model.get_submodule(name) for name in names]
    for layer in packed:
        layer.wf = layer.wf.to(layer.qzeros.device)  # beside the weights, where the library puts it in the first pass
    named = ", ".join(sorted({kernel(layer) for layer in packed}))
    return LoadedModel(model=model, config=config, kernel=named, notes=notes)
