"""Loads dense models and saved ones, and saves. Imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from polyquant.plugin import LoadedModel, LoadRequest, checkpoints, quantized_modules, resolved_dtype

from polyquant_rowwise._layers import KERNEL, RowwiseLinear, quantize_linear
from polyquant_rowwise.options import RowwiseOptions
from polyquant_rowwise.planning import plan_layers


def load(request: LoadRequest, config: RowwiseOptions) -> LoadedModel:
    """The model, read as it was saved, or quantized layer by layer: each dense weight is freed before the next."""
    dtype, scale_dtype = resolved_dtype(config), getattr(torch, config.scale_dtype)

    def quantize(name: str, linear: Any) -> RowwiseLinear:
        return quantize_linear(linear, config)

    # Replace: how one layer is made of its stored tensors
    def read(name: str, linear: Any, tensors: dict[str, torch.Tensor]) -> RowwiseLinear:
        return RowwiseLinear.from_tensors(linear, tensors, scale_dtype, getattr(torch, dtype))

    if request.source.stored_quantization:
        names = sorted(checkpoints.packed_modules(request.source, ("scale",)))
        model = checkpoints.read_layers(request, dtype, names, read)
    else:
        names = quantized_modules(plan_layers(request.weights, config))
        model = checkpoints.quantize_layers(request, dtype, names, quantize)
    return LoadedModel(model=model, config=config, kernel=KERNEL)


def save(loaded: LoadedModel, out: Path) -> Path:
    """int8 weights, scales and dense tensors in safetensors; the options in config.json."""
    return checkpoints.save(loaded, out, dict(loaded.model.state_dict()), loaded.config.to_stored())
