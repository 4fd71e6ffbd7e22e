"""Quantizes layer by layer, and reads and writes checkpoints: transformers 5 no longer does either for HQQ."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, get_args

import torch
from hqq.core.quantize import HQQLinear
from polyquant.errors import ModelError
from polyquant.loaded import LoadedModel
from polyquant.memory.weights import list_weights
from polyquant.models import hf
from polyquant.options import resolved_dtype
from polyquant.plugin import checkpoints, gradients
from polyquant.request import LoadRequest
from polyquant.types import Dtype
from tqdm import tqdm

from polyquant_hqq._layers import KERNEL, linear_from_tensors, quantized_linear
from polyquant_hqq.options import HqqOptions
from polyquant_hqq.planning import plan_layers


def load(request: LoadRequest, config: HqqOptions) -> LoadedModel:
    model = _read(request, config) if request.source.stored_quantization else _quantize(request, config)
    model.config.quantization_config = config.stored()
    notes = [] if config.optimize else ["zero points are not optimized: this is plain rounding, not HQQ"]
    tokenizer = hf.load_tokenizer(request.source, trust_remote_code=request.trust_remote_code)
    return LoadedModel(model=model, tokenizer=tokenizer, config=config, kernel=KERNEL, notes=notes)


def save(loaded: LoadedModel, out: Path) -> Path:
    """The tensors under the names transformers 4 gave them: W_q, scale and zero of each layer."""
    tensors = {name: parameter.detach() for name, parameter in loaded.model.named_parameters()}
    for name, module in loaded.model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, HQQLinear):
            tensors |= {f"{prefix}{key}": module.meta[key] for key in ("scale", "zero")}
        kept = set(module._buffers) - module._non_persistent_buffers_set
        tensors |= {f"{prefix}{key}": module._buffers[key] for key in kept if module._buffers[key] is not None}
    return checkpoints.save(loaded, out, tensors, dict(loaded.model.config.quantization_config))


def prepare_for_training(loaded: LoadedModel) -> Any:
    """Freeze, and recompute activations in the backward pass."""
    return gradients.frozen_for_adapters(loaded.model)


def _quantize(request: LoadRequest, config: HqqOptions) -> Any:
    """The dense model, its layers replaced one by one.

    It is loaded in the checkpoint's dtype: on the CPU its weights are then pages of the file, read in turn.
    """
    wanted: Dtype = resolved_dtype(config)
    weights = list_weights(hf.skeleton(request.source, wanted, trust_remote_code=request.trust_remote_code))
    names = [plan.name.rpartition(".")[0] for plan in plan_layers(weights, config) if plan.quantized]
    stored = request.source.config.get("dtype") or request.source.config.get("torch_dtype")
    model = checkpoints.load_causal_lm(request, stored if stored in get_args(Dtype) else wanted)
    dtype = getattr(torch, wanted)
    for name in tqdm(names, desc="Quantizing", unit="layer", disable=not request.progress):
        model.set_submodule(name, quantized_linear(model.get_submodule(name), config, dtype))
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def _read(request: LoadRequest, config: HqqOptions) -> Any:
    dtype, device = getattr(torch, resolved_dtype(config)), checkpoints.single_device(request)
    casts = request.source.stored_quantization.get("compute_dtype") != config.compute_dtype
    model = checkpoints.empty_causal_lm(request, resolved_dtype(config))
    layers: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in checkpoints.read_tensors(request.source):
        layers[name.rpartition(".")[0]][name.rpartition(".")[2]] = tensor
    dense: dict[str, torch.Tensor] = {}
    for name, tensors in layers.items():
        if "W_q" not in tensors:
            for key, tensor in tensors.items():
                dense[f"{name}.{key}"] = tensor.to(device, dtype if casts and tensor.is_floating_point() else None)
            continue
        try:
            moved = {key: tensor.to(device) for key, tensor in tensors.items()}
            model.set_submodule(name, linear_from_tensors(model.get_submodule(name), config, dtype, moved))
        except (AttributeError, ModelError) as error:
            raise ModelError(f"{request.source.name}: {name} cannot be read: {error}") from error
    checkpoints.fill(model, dense, request.source)
    return model.to(device)
