"""Reads AWQ checkpoints into gptqmodel's layers: every tensor is checked by name and shape on the way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import torch
from polyquant.memory.weights import list_weights
from polyquant.plugin import LoadedModel, LoadRequest, ModelSource, checkpoints, resolved_dtype

from polyquant_awq._layers import empty_layer, select_kernel, settle
from polyquant_awq._library import contained, hf_gptqmodel_post_init
from polyquant_awq.options import AwqOptions
from polyquant_awq.planning import cpu_kernel, plan_layers

PARTS = ("qweight", "qzeros", "scales")


def load(request: LoadRequest, config: AwqOptions) -> LoadedModel:
    source, dtype = request.source, getattr(torch, resolved_dtype(config))
    tokenizer = checkpoints.load_tokenizer(source, trust_remote_code=request.trust_remote_code)
    model = checkpoints.empty_causal_lm(request, resolved_dtype(config))
    weights = list_weights(model)
    quantized = checkpoints.packed_modules(source, PARTS)
    config, notes = checkpoints.with_stored_skips(config, weights, quantized, source)
    if request.device == "cpu" and config.kernel == "auto":
        config = msgspec.structs.replace(config, kernel=cpu_kernel(config))
    plan_layers(weights, config)  # refuses layers that cannot be packed
    kernel = select_kernel(config, request.device)
    for name in sorted(quantized):
        model.set_submodule(name, empty_layer(model.get_submodule(name), kernel, config, name))
    checkpoints.fill(model, dict(_tensors(model, quantized, source, dtype)), source)
    with contained():
        checkpoints.place(model, request)
        hf_gptqmodel_post_init(model, use_act_order=False)
        if request.device == "cpu":
            for name in quantized:
                settle(model.get_submodule(name), dtype)
    model.config.quantization_config = config.stored()
    named = ", ".join(sorted({f"gptqmodel {type(model.get_submodule(name)).__name__}" for name in quantized}))
    return LoadedModel(model=model, tokenizer=tokenizer, config=config, kernel=named, notes=notes)


def _tensors(
    model: Any, quantized: set[str], source: ModelSource, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors, all but the packed ones in the compute dtype."""
    for name, tensor in checkpoints.own_tensors(model, source):
        owner, _, short = name.rpartition(".")
        yield name, tensor if owner in quantized and short in ("qweight", "qzeros") else tensor.to(dtype)
