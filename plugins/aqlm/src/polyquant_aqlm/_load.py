"""Reads and writes checkpoints itself: transformers 5.23 takes no notice of names in linear_weights_not_to_quantize."""

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
from tqdm import tqdm

from polyquant_aqlm._layers import TENSORS, chosen_kernel, linear_from_tensors
from polyquant_aqlm.kernels import LOOKUP
from polyquant_aqlm.options import AqlmOptions
from polyquant_aqlm.planning import plan_layers

COMPILES = "the first token waits a second or two: numba compiles its kernel then, once a process"


def load(request: LoadRequest, config: AqlmOptions) -> LoadedModel:
    kernel = chosen_kernel(config, request.device)
    model = _read(request, config, kernel)
    model.config.quantization_config = config.stored()
    tokenizer = hf.load_tokenizer(request.source, trust_remote_code=request.trust_remote_code)
    notes = [COMPILES] if kernel == LOOKUP else []
    return LoadedModel(model=model, tokenizer=tokenizer, config=config, kernel=kernel, notes=notes)


def save(loaded: LoadedModel, out: Path) -> Path:
    """Under the names transformers gives them: codes, codebooks and scales of each layer."""
    tensors = {name: tensor.detach() for name, tensor in loaded.model.state_dict().items()}
    return packed.save(loaded, out, tensors, dict(loaded.model.config.quantization_config))


def prepare_for_training(loaded: LoadedModel) -> Any:
    """Freeze, and recompute activations in the backward pass."""
    return hf.frozen_for_adapters(loaded.model)


def _read(request: LoadRequest, config: AqlmOptions, kernel: str) -> Any:
    source, wanted = request.source, resolved_dtype(config)
    dtype = getattr(torch, wanted)
    weights = list_weights(hf.skeleton(source, wanted, trust_remote_code=request.trust_remote_code))
    names = [plan.name.rpartition(".")[0] for plan in plan_layers(weights, config) if plan.quantized]
    model = packed.empty_causal_lm(request, wanted)
    layers: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in packed.own_tensors(model, source):
        module, _, short = name.rpartition(".")
        layers[module][short] = tensor
    _require_expected(layers, names, source.name)
    for name in tqdm(names, desc="Loading", unit="layer", disable=not request.progress):
        try:
            linear = linear_from_tensors(name, model.get_submodule(name), config, dtype, layers.pop(name, {}), kernel)
        except ModelError as error:
            raise ModelError(f"{source.name}: {error}") from error
        model.set_submodule(name, linear)
    dense = {
        f"{module}.{short}" if module else short: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for module, tensors in layers.items()
        for short, tensor in tensors.items()
    }
    packed.fill(model, dense, source)
    packed.place(model, request)
    return model


def _require_expected(layers: dict[str, dict[str, torch.Tensor]], names: list[str], source: str) -> None:
    """Raises ModelError for codes of a module that the checkpoint's config, or the architecture, keeps dense."""
    astray = sorted({name for name, tensors in layers.items() if set(TENSORS) & set(tensors)} - set(names))
    if astray:
        raise ModelError(
            f"{source}: {len(astray)} modules have codes, and should be dense by the checkpoint's config or the "
            f"model's architecture: {', '.join(astray[:3])}"
        )
