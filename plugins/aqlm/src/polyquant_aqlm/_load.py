"""Reads and writes checkpoints itself: transformers 5.23 takes no notice of names in linear_weights_not_to_quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from polyquant.errors import ModelError
from polyquant.memory.weights import list_weights
from polyquant.models import hf
from polyquant.plugin import LoadedModel, LoadRequest, ModelSource, checkpoints, layers, resolved_dtype

from polyquant_aqlm._layers import TENSORS, chosen_kernel, linear_from_tensors
from polyquant_aqlm.kernels import LOOKUP
from polyquant_aqlm.options import AqlmOptions
from polyquant_aqlm.planning import plan_layers

COMPILES = "the first token waits a second or two: numba compiles its kernel then, once a process"


def load(request: LoadRequest, config: AqlmOptions) -> LoadedModel:
    kernel = chosen_kernel(config, request.device)
    tokenizer = checkpoints.load_tokenizer(request.source, trust_remote_code=request.trust_remote_code)
    model = _read(request, config, kernel)
    model.config.quantization_config = config.stored()
    notes = [COMPILES] if kernel == LOOKUP else []
    return LoadedModel(model=model, tokenizer=tokenizer, config=config, kernel=kernel, notes=notes)


def save(loaded: LoadedModel, out: Path) -> Path:
    """Under the names transformers gives them: codes, codebooks and scales of each layer."""
    tensors = {name: tensor.detach() for name, tensor in loaded.model.state_dict().items()}
    return checkpoints.save(loaded, out, tensors, dict(loaded.model.config.quantization_config))


def prepare_for_training(loaded: LoadedModel) -> Any:
    """Freeze, and recompute activations in the backward pass."""
    return layers.frozen_for_adapters(loaded.model)


def _read(request: LoadRequest, config: AqlmOptions, kernel: str) -> Any:
    source, wanted = request.source, resolved_dtype(config)
    weights = list_weights(hf.skeleton(source, wanted, trust_remote_code=request.trust_remote_code))
    names = [plan.name.rpartition(".")[0] for plan in plan_layers(weights, config) if plan.quantized]
    _require_expected(source, names)

    def make(name: str, module: Any, tensors: dict[str, torch.Tensor]) -> Any:
        return linear_from_tensors(name, module, config, getattr(torch, wanted), tensors, kernel)

    return checkpoints.read_layers(request, wanted, names, make)


def _require_expected(source: ModelSource, names: list[str]) -> None:
    """Raises ModelError for codes of a module that the checkpoint's config, or the architecture, keeps dense."""
    astray = sorted(checkpoints.packed_modules(source, tuple(TENSORS)) - set(names))
    if astray:
        raise ModelError(
            f"{source.name}: {len(astray)} modules have codes, and should be dense by the checkpoint's config or the "
            f"model's architecture: {', '.join(astray[:3])}"
        )
