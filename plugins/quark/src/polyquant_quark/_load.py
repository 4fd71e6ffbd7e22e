"""Reads checkpoints into packed layers, and writes them; needs nothing of amd-quark. Imports torch."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from polyquant import hf, packed
from polyquant.errors import ModelError
from polyquant.loaded import LoadedModel
from polyquant.memory.weights import list_weights
from polyquant.options import resolved_dtype
from polyquant.request import LoadRequest

from polyquant_quark._layers import KERNEL, quark_linear
from polyquant_quark.options import QuarkOptions
from polyquant_quark.planning import quantized_modules


def load(request: LoadRequest, config: QuarkOptions) -> LoadedModel:
    source, stored = request.source, request.source.stored_quantization
    dtype = getattr(torch, resolved_dtype(config))
    model = packed.empty_causal_lm(request, resolved_dtype(config))
    weights = list_weights(model)
    config, notes = packed.with_stored_skips(config, weights, packed.packed_modules(source, ("weight_scale",)), source)
    layers: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in packed.own_tensors(model, source):
        layers[name.rpartition(".")[0]][name.rpartition(".")[2]] = tensor
    for name in quantized_modules(weights, config):
        try:
            packing = stored["export"].get("pack_method", "reorder")
            layer = quark_linear(model.get_submodule(name), config, dtype, packing, layers.pop(name, {}))
        except ModelError as error:
            raise ModelError(f"{source.name}: {name} cannot be read: {error}") from error
        model.set_submodule(name, layer)
    dense = {f"{name}.{key}": tensor for name, tensors in layers.items() for key, tensor in tensors.items()}
    for name, tensor in dense.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(f"{source.name}: {name} is {kind}, and there is no weight_scale beside it")
    packed.fill(model, {name: tensor.to(dtype) for name, tensor in dense.items()}, source)
    packed.place(model, request)
    model.config.quantization_config = {**stored, "exclude": list(config.skip)}
    tokenizer = hf.load_tokenizer(source, trust_remote_code=request.trust_remote_code)
    return LoadedModel(model=model, tokenizer=tokenizer, config=config, kernel=KERNEL, notes=notes)


def save(loaded: LoadedModel, out: Path) -> Path:
    tensors = {name: tensor.detach() for name, tensor in loaded.model.state_dict().items()}
    return packed.save(loaded, out, tensors, dict(loaded.model.config.quantization_config))


def prepare_for_training(loaded: LoadedModel) -> Any:
    """Freeze, and recompute activations in the backward pass."""
    return hf.frozen_for_adapters(loaded.model)
