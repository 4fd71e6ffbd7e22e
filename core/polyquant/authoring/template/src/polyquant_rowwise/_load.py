"""Loads dense models and saved ones, and saves. Imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from polyquant.models import versions
from polyquant.plugin import LoadedModel, LoadRequest, checkpoints, resolved_dtype

from polyquant_rowwise._layers import KERNEL, RowwiseLinear
from polyquant_rowwise.options import RowwiseOptions


def load(request: LoadRequest, config: RowwiseOptions) -> LoadedModel:
    """The model, quantized on the way or read as it was saved, with its tokenizer."""
    model = _read(request, config) if request.source.stored_quantization else _quantize(request, config)
    model.config.quantization_config = config.native()
    tokenizer = checkpoints.load_tokenizer(request.source, trust_remote_code=request.trust_remote_code)
    return LoadedModel(model=model, tokenizer=tokenizer, config=config, kernel=KERNEL)


def save(loaded: LoadedModel, out: Path) -> Path:
    """int8 weights, scales and dense tensors in safetensors; the options in config.json."""
    return checkpoints.save(loaded, out, dict(loaded.model.state_dict()), loaded.config.native())


def prepare_for_training(loaded: LoadedModel) -> Any:
    """The model with its base frozen; gradients reach the adapters that PEFT puts into it."""
    model = loaded.model.requires_grad_(requires_grad=False)
    model.enable_input_require_grads()
    return model


def _quantize(request: LoadRequest, config: RowwiseOptions) -> Any:
    """The dense model, one module after the other replaced; each dense weight is freed before the next is quantized."""
    model = checkpoints.load_causal_lm(request, resolved_dtype(config))
    by_default = config.skip_defaults and not config.skip
    dense = versions.default_dense_modules(model) if by_default else set(config.skip)
    names = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear and name not in dense]
    for name in names:  # Replace: how one layer becomes yours
        module = RowwiseLinear.quantize(model.get_submodule(name), getattr(torch, config.scale_dtype))
        model.set_submodule(name, module.eval())
    return model


def _read(request: LoadRequest, config: RowwiseOptions) -> Any:
    """A saved model; what has a scale is quantized, and dense tensors take the compute dtype."""
    dtype, device = getattr(torch, resolved_dtype(config)), checkpoints.single_device(request)
    model = checkpoints.empty_causal_lm(request, resolved_dtype(config))
    tensors = {}
    for name, tensor in checkpoints.read_tensors(request.source):
        dense = tensor.is_floating_point() and not name.endswith(".scale")
        tensors[name] = tensor.to(device, dtype) if dense else tensor.to(device)
    for name in [name.removesuffix(".scale") for name in tensors if name.endswith(".scale")]:
        module = RowwiseLinear.empty(model.get_submodule(name), getattr(torch, config.scale_dtype))
        model.set_submodule(name, module.eval())
    checkpoints.fill(model, tensors, request.source)
    return model.to(device)
