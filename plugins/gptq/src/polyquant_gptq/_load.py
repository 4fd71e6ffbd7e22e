"""Reads GPTQ checkpoints into gptqmodel's layers: every tensor is checked by name and shape on the way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import torch
from polyquant.memory.weights import list_weights
from polyquant.plugin import LoadedModel, LoadRequest, ModelSource, checkpoints, resolved_dtype

from polyquant_gptq._layers import empty_layer, select_kernel, settle
from polyquant_gptq._library import (
    BaseQuantLinear,
    contained,
    hf_convert_gptq_v1_to_v2_format,
    hf_gptqmodel_post_init,
)
from polyquant_gptq.options import GptqOptions, stored_format
from polyquant_gptq.planning import cpu_kernel, plan_layers

PARTS = ("qweight", "qzeros", "scales", "g_idx")


def load(request: LoadRequest, config: GptqOptions) -> LoadedModel:
    source, dtype = request.source, getattr(torch, resolved_dtype(config))
    tokenizer = checkpoints.load_tokenizer(source, trust_remote_code=request.trust_remote_code)
    model = checkpoints.empty_causal_lm(request, resolved_dtype(config))
    weights = list_weights(model)
    quantized = checkpoints.packed_modules(source, PARTS)
    config, notes = checkpoints.with_stored_skips(config, weights, quantized, source)
    if request.device == "cpu" and config.kernel == "auto":
        config = msgspec.structs.replace(config, kernel=cpu_kernel(config, resolved_dtype(config)))
    plan_layers(weights, config)  # refuses layers that cannot be packed
    layout = stored_format(source.stored_quantization)
    kernel = select_kernel(config, layout, request.device)
    for name in sorted(quantized):
        model.set_submodule(name, empty_layer(model.get_submodule(name), kernel, config, name))
    tensors = dict(_tensors(model, quantized, source, dtype, on_cpu=request.device == "cpu"))
    for name in quantized:
        tensors.setdefault(f"{name}.g_idx", _plain_order(model.get_submodule(name)))
    checkpoints.fill(model, tensors, source)
    del tensors
    with contained():
        hf_convert_gptq_v1_to_v2_format(model, config.bits, kernel, layout, None)
        checkpoints.place(model, request)
        hf_gptqmodel_post_init(model, use_act_order=config.desc_act)
        if request.device == "cpu":
            for name in quantized:
                settle(model.get_submodule(name), dtype)
    model.config.quantization_config = config.stored()
    named = ", ".join(sorted({f"gptqmodel {type(model.get_submodule(name)).__name__}" for name in quantized}))
    return LoadedModel(model=model, tokenizer=tokenizer, config=config, kernel=named, notes=notes)


def _tensors(
    model: Any, quantized: set[str], source: ModelSource, dtype: torch.dtype, *, on_cpu: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors in the dtypes in which they are kept."""
    for name, tensor in checkpoints.own_tensors(model, source):
        owner, _, short = name.rpartition(".")
        if owner not in quantized or short == "bias":
            if owner in quantized and model.get_submodule(owner).bias is None and not tensor.any():
                continue  # auto-gptq wrote biases of zeros for layers that have none
            yield name, tensor.to(dtype)
        elif short == "scales":
            kept = on_cpu and dtype != torch.float32 and tensor.element_size() == 2
            yield name, tensor if kept else tensor.to(dtype)
        else:
            yield name, tensor.clone() if short == "qzeros" else tensor  # zero points are changed in place


def _plain_order(layer: BaseQuantLinear) -> torch.Tensor:
    """The group of each column where columns were not reordered. Shape: (in_features,)."""
    return torch.arange(layer.in_features, dtype=torch.int32) // layer.group_size
