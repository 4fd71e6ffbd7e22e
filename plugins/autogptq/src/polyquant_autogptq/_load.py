"""Reads GPTQ checkpoints into auto-gptq's layers: every tensor is checked by name and shape on the way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from polyquant.memory.weights import list_weights
from polyquant.plugin import LoadedModel, LoadRequest, ModelSource, checkpoints, resolved_dtype

from polyquant_autogptq._layers import empty_layer, kernel, settle
from polyquant_autogptq.options import AutogptqOptions
from polyquant_autogptq.planning import plan_layers

PARTS = ("qweight", "qzeros", "scales", "g_idx")


def load(request: LoadRequest, config: AutogptqOptions) -> LoadedModel:
    source, dtype = request.source, getattr(torch, resolved_dtype(config))
    model = checkpoints.empty_causal_lm(request, resolved_dtype(config))
    weights = list_weights(model)
    quantized = checkpoints.packed_modules(source, PARTS)
    config, notes = checkpoints.with_stored_skips(config, weights, quantized, source)
    plan_layers(weights, config)  # refuses layers that cannot be held
    for name in sorted(quantized):
        model.set_submodule(name, empty_layer(model.get_submodule(name), config, dtype))
    tensors = dict(_tensors(model, quantized, source, dtype))
    for name in quantized:
        tensors.setdefault(f"{name}.g_idx", _plain_order(model.get_submodule(name)))
    checkpoints.fill(model, tensors, source)
    checkpoints.place(model, request)
    for name in quantized:
        settle(model.get_submodule(name))
    model.config.quantization_config = config.stored()
    tokenizer = checkpoints.load_tokenizer(source, trust_remote_code=request.trust_remote_code)
    named = ", ".join(sorted({kernel(model.get_submodule(name)) for name in quantized}))
    return LoadedModel(model=model, tokenizer=tokenizer, config=config, kernel=named, notes=notes)


def _tensors(
    model: Any, quantized: set[str], source: ModelSource, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors: scales and dense ones in the compute dtype, in which the library multiplies."""
    for name, tensor in checkpoints.own_tensors(model, source):
        owner, _, short = name.rpartition(".")
        if owner in quantized and short == "bias" and model.get_submodule(owner).bias is None and not tensor.any():
            continue  # auto-gptq writes biases of zeros for layers that have none
        yield name, tensor if owner in quantized and short in ("qweight", "qzeros", "g_idx") else tensor.to(dtype)


def _plain_order(layer: Any) -> torch.Tensor:
    """The group of each column where columns were not reordered. Shape: (in_features,)."""
    return torch.arange(layer.infeatures, dtype=torch.int32) // layer.group_size
