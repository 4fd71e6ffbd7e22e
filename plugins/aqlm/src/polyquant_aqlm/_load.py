"""Reads and writes checkpoints itself: transformers 5.23 takes no notice of names in linear_weights_not_to_quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from polyquant.errors import ModelError
from polyquant.plugin import LoadedModel, LoadRequest, checkpoints, quantized_modules, resolved_dtype

from polyquant_aqlm._kernels import LOOKUP
from polyquant_aqlm._layers import TENSORS, QuantizedLinear, chosen_kernel, linear_from_tensors
from polyquant_aqlm.options import AqlmOptions
from polyquant_aqlm.planning import plan_layers

COMPILES = "the first token waits a second or two: numba compiles its kernel then, once a process"


def load(request: LoadRequest, config: AqlmOptions) -> LoadedModel:
    source, wanted = request.source, resolved_dtype(config)
    kernel = chosen_kernel(config, request.device)
    names = quantized_modules(plan_layers(request.weights, config))
    if astray := sorted(checkpoints.packed_modules(source, TENSORS) - set(names)):
        raise ModelError(
            f"{source.name}: {len(astray)} modules have codes, and should be dense by the checkpoint's config or the "
            f"model's architecture: {', '.join(astray[:3])}"
        )

    def make(name: str, linear: Any, tensors: dict[str, torch.Tensor]) -> QuantizedLinear:
        return linear_from_tensors(linear, config, getattr(torch, wanted), tensors, kernel)

    model = checkpoints.read_layers(request, wanted, names, make)
    notes = [COMPILES] if kernel == LOOKUP else []
    return LoadedModel(model=model, config=config, kernel=kernel, notes=notes)


def save(loaded: LoadedModel, out: Path) -> Path:
    """Under the names transformers gives them: codes, codebooks and scales of each layer."""
    return checkpoints.save(loaded, out)
