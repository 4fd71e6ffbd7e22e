"""Reads AWQ checkpoints into AutoAWQ's layers: every tensor is checked by name and shape on the way."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from polyquant.memory.weights import list_weights
from polyquant.plugin import LoadedModel, LoadRequest, ModelSource, checkpoints, resolved_dtype

from polyquant_autoawq._layers import empty_layer, kernel, settle
from polyquant_autoawq.options import AutoawqOptions
from polyquant_autoawq.planning import plan_layers

PARTS = ("qweight", "qzeros", "scales")
SLOW = "Using naive"  # the library's warning, once a process; `kernel` says the same


def load(request: LoadRequest, config: AutoawqOptions) -> LoadedModel:
    source, dtype = request.source, getattr(torch, resolved_dtype(config))
    model = checkpoints.empty_causal_lm(request, resolved_dtype(config))
    weights = list_weights(model)
    quantized = checkpoints.packed_modules(source, PARTS)
    config, notes = checkpoints.with_stored_skips(config, weights, quantized, source)
    plan_layers(weights, config)  # refuses layers that cannot be packed
    for name in sorted(quantized):
        model.set_submodule(name, empty_layer(model.get_submodule(name), config))
    checkpoints.fill(model, dict(_tensors(model, quantized, source, dtype)), source)
    checkpoints.place(model, request)
    for name in quantized:
        settle(model.get_submodule(name))
    model.config.quantization_config = config.stored()
    tokenizer = checkpoints.load_tokenizer(source, trust_remote_code=request.trust_remote_code)
    _warm(model.get_submodule(min(quantized)))
    return LoadedModel(model=model, tokenizer=tokenizer, config=config, kernel=kernel(request.device), notes=notes)


def _warm(layer: Any) -> None:
    """One pass of one layer, in which the library has its warning."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.filterwarnings("ignore", message=SLOW)
        layer(torch.zeros(1, 1, layer.in_features, dtype=torch.float16, device=layer.qweight.device))


def _tensors(
    model: Any, quantized: set[str], source: ModelSource, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors: dense ones in the compute dtype, scales in float16, in which the library multiplies."""
    for name, tensor in checkpoints.own_tensors(model, source):
        owner, _, short = name.rpartition(".")
        packed_part = owner in quantized and short in PARTS
        yield name, tensor if packed_part and short != "scales" else tensor.to(torch.float16 if packed_part else dtype)
