"""Quantizes layer by layer, and reads and writes checkpoints: transformers dequantizes them where no GPU is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from polyquant.errors import ConfigError, ModelError
from polyquant.plugin import (
    LoadedModel,
    LoadRequest,
    checkpoints,
    dense_linears,
    module_of,
    quantized_modules,
    resolved_dtype,
)

from polyquant_fp8._layers import linear_from_tensors, quantize_linear
from polyquant_fp8._modules import KERNEL
from polyquant_fp8.options import Float8Options
from polyquant_fp8.planning import plan_layers

ACTIVATIONS = "activations stay in {}: the checkpoint asks for {} FP8 activations, which GPU kernels round to for speed"


def load(request: LoadRequest, config: Float8Options) -> LoadedModel:
    if request.source.stored_quantization:
        return _read(request, config)
    if config.static_activations:
        raise ConfigError("activation_scheme 'static' needs scales that a checkpoint brings; quantize with 'dynamic'")
    names = quantized_modules(plan_layers(request.weights, config))
    model = checkpoints.quantize_layers(
        request, resolved_dtype(config), names, lambda _, linear: quantize_linear(linear, config)
    )
    return LoadedModel(model=model, config=config, kernel=KERNEL)


def save(loaded: LoadedModel, out: Path) -> Path:
    """Under the names transformers gives them: weight and scales of each layer.

    Experts are dense in the file, and listed so: other readers take them for FP8 else.
    """
    stored, config = dict(loaded.model.config.quantization_config), loaded.config
    weights = loaded.settled.weights if loaded.settled else ()
    if experts := [module_of(each) for each in weights if each.role == "experts" and not config.skips(each)]:
        dense = [*config.skip, *dense_linears(weights, config), *experts]
        stored |= {"modules_to_not_convert": list(dict.fromkeys(dense)), "skip_modules": config.stored_skip}
    return checkpoints.save(loaded, out, quantization_config=stored)


def _read(request: LoadRequest, config: Float8Options) -> LoadedModel:
    source, wanted = request.source, resolved_dtype(config)
    config, notes = checkpoints.as_packed(config, request, (config.scale_name,))

    def make(_: str, linear: Any, tensors: dict[str, torch.Tensor]) -> Any:
        return linear_from_tensors(linear, config, getattr(torch, wanted), tensors)

    def check(name: str, tensor: torch.Tensor) -> None:
        if tensor.element_size() == 1 and tensor.is_floating_point():
            raise ModelError(f"{source.name}: {name} is {tensor.dtype}, and has no {config.scale_name} beside it")

    names = quantized_modules(plan_layers(request.weights, config))
    model = checkpoints.read_layers(request, wanted, names, make, check=check)
    notes.append(ACTIVATIONS.format(wanted, "static" if config.static_activations else "dynamic"))
    return LoadedModel(model=model, config=config, kernel=KERNEL, notes=notes)
