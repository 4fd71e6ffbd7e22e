"""Reads checkpoints into packed layers, and writes them; needs nothing of amd-quark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from polyquant.errors import ModelError
from polyquant.plugin import LoadedModel, LoadRequest, checkpoints, quantized_modules, resolved_dtype

from polyquant_quark._layers import KERNEL, QuarkLinear, quark_linear
from polyquant_quark.options import QuarkOptions
from polyquant_quark.planning import plan_layers


def load(request: LoadRequest, config: QuarkOptions) -> LoadedModel:
    source, wanted = request.source, resolved_dtype(config)
    stored = source.stored_quantization
    packing = stored["export"].get("pack_method", "reorder")

    def make(name: str, linear: Any, tensors: dict[str, torch.Tensor]) -> QuarkLinear:
        return quark_linear(linear, config, getattr(torch, wanted), packing, tensors)

    def check(name: str, tensor: torch.Tensor) -> None:
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(f"{source.name}: {name} is {kind}, and there is no weight_scale beside it")

    config, notes = checkpoints.as_packed(config, request, ("weight_scale",))
    names = quantized_modules(plan_layers(request.weights, config))
    model = checkpoints.read_layers(request, wanted, names, make, check=check)
    model.config.quantization_config = {**stored, "exclude": list(config.skip)}
    return LoadedModel(model=model, config=config, kernel=KERNEL, notes=notes)


def save(loaded: LoadedModel, out: Path) -> Path:
    return checkpoints.save(loaded, out)
