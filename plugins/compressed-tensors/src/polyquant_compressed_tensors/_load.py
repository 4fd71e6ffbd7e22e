"""Reads checkpoints into packed layers, and writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from polyquant.plugin import (
    LoadedModel,
    LoadRequest,
    checkpoints,
    experts,
    is_packed,
    module_of,
    resolved_dtype,
)
from polyquant.plugin.layers import LinearExperts

from polyquant_compressed_tensors._kernels import Int4PackLinear
from polyquant_compressed_tensors._layers import CompressedLinear, packed_linear
from polyquant_compressed_tensors.formats import OWN, joined_matrices, plain_format, stored_expert
from polyquant_compressed_tensors.options import CompressedTensorsOptions
from polyquant_compressed_tensors.planning import plan_layers, uses_int4pack

NOT_ROUNDED = "activations are not rounded: with kernel='packed' only the weights are what the checkpoint says"


def load(request: LoadRequest, config: CompressedTensorsOptions) -> LoadedModel:
    stored, wanted = request.source.stored_quantization, resolved_dtype(config)
    config = config.with_kernel(torch.device(request.device).type, wanted)
    plans = [plan for plan in plan_layers(request.weights, config) if plan.quantized]
    names = [plan.name if plan.role == "experts" else module_of(plan) for plan in plans]
    of_name = {weight.name: weight for weight in request.weights}
    own = {name: config.of(of_name[plan.name]) for name, plan in zip(names, plans, strict=True)}

    def make(name: str, dense: Any, tensors: dict[str, torch.Tensor]) -> Any:
        stack, options = isinstance(dense, torch.Tensor), own[name]
        sparse = options.weights == "sparse" or "compressed" in tensors
        plain = sparse or plain_format(stored, stored_expert(name) if stack else name)
        matrices = joined_matrices(name) if stack else 1

        def of_one(linear: Any, tensors: dict[str, torch.Tensor]) -> CompressedLinear:
            layer = packed_linear(linear, options, getattr(torch, wanted), tensors, plain=plain, matrices=matrices)
            return Int4PackLinear(layer) if uses_int4pack((layer.out_features, layer.in_features), options) else layer

        return experts.stack(dense, tensors, of_one) if stack else of_one(dense, tensors)

    model = checkpoints.read_layers(request, wanted, names, make, part=experts.part_of(request.names))
    model.config.quantization_config = {**stored, OWN: config.own_fields()}
    layers = (model.get_submodule(name) for name in names)
    kernels = dict.fromkeys(getattr(layer, "like", layer).kernel for layer in layers)
    notes = [NOT_ROUNDED] if is_packed(config) and config.rounds_activations else []
    return LoadedModel(model=model, config=config, kernel=" and ".join(kernels), notes=notes)


def save(loaded: LoadedModel, out: Path) -> Path:
    """The tensors in the format they were read in, and the quantization_config with the compute dtype.

    Experts one by one, as they were.
    """
    stored, tensors = dict(loaded.model.config.quantization_config), dict(loaded.model.state_dict())
    named = checkpoints.MODEL  # what is sparse transformers does not read: its library has lost it
    for name, module in loaded.model.named_modules():
        if isinstance(module, CompressedLinear):
            own = module.checkpoint_tensors(plain=module.sparse or plain_format(stored, name))
            named = checkpoints.OWN_FORMAT if module.sparse else named
        elif isinstance(module, LinearExperts):
            own = _of_all(module, plain=plain_format(stored, stored_expert(name)))
        else:
            continue
        for key in module.state_dict():
            del tensors[f"{name}.{key}"]
        tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
    return checkpoints.save(loaded, out, experts.as_stored(loaded, tensors), stored, named=named)


def _of_all(stack: LinearExperts, *, plain: bool) -> dict[str, torch.Tensor]:
    """What a checkpoint stores of each expert, in one tensor for all of them."""
    each = [stack.expert(number).checkpoint_tensors(plain=plain) for number in range(stack.count)]
    return {name: torch.stack([own[name] for own in each]) for name in each[0]}
