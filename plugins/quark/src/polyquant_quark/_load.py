"""Reads checkpoints into packed layers, and writes them; needs nothing of amd-quark. Imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from polyquant.errors import ModelError
from polyquant.memory.weights import list_weights
from polyquant.models import hf
from polyquant.plugin import LoadedModel, LoadRequest, checkpoints, layers, resolved_dtype

from polyquant_quark._layers import KERNEL, quark_linear
from polyquant_quark.options import QuarkOptions
from polyquant_quark.planning import quantized_modules


def load(request: LoadRequest, config: QuarkOptions) -> LoadedModel:
    source, wanted = request.source, resolved_dtype(config)
    stored = source.stored_quantization
    packing = stored["export"].get("pack_method", "reorder")
    tokenizer = checkpoints.load_tokenizer(source, trust_remote_code=request.trust_remote_code)

    def make(name: str, module: Any, tensors: dict[str, torch.Tensor]) -> Any:
        try:
            return quark_linear(module, config, getattr(torch, wanted), packing, tensors)
        except ModelError as error:
            raise ModelError(f"{name} cannot be read: {error}") from error

    def check(name: str, tensor: torch.Tensor) -> None:
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(f"{source.name}: {name} is {kind}, and there is no weight_scale beside it")

    weights = list_weights(hf.skeleton(source, wanted, trust_remote_code=request.trust_remote_code))
    config, notes = checkpoints.with_stored_skips(
        config, weights, checkpoints.packed_modules(source, ("weight_scale",)), source
    )
    model = checkpoints.read_layers(request, wanted, quantized_modules(weights, config), make, check=check)
    model.config.quantization_config = {**stored, "exclude": list(config.skip)}
    return LoadedModel(model=model, tokenizer=tokenizer, config=config, kernel=KERNEL, notes=notes)


def save(loaded: LoadedModel, out: Path) -> Path:
    tensors = {name: tensor.detach() for name, tensor in loaded.model.state_dict().items()}
    return checkpoints.save(loaded, out, tensors, dict(loaded.model.config.quantization_config))


def prepare_for_training(loaded: LoadedModel) -> Any:
    """Freeze, and recompute activations in the backward pass."""
    return layers.frozen_for_adapters(loaded.model)
