"""Quantizes layer by layer, and reads and writes checkpoints: transformers runs EETQ's on NVIDIA GPUs alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from polyquant.errors import ConfigError, ModelError
from polyquant.plugin import LoadedModel, LoadRequest, checkpoints, module_of, quantized_modules, resolved_dtype

from polyquant_row_scales._decode import eetq_of_rows
from polyquant_row_scales._layers import (
    embedding_from_tensors,
    linear_from_tensors,
    quantize_embedding,
    quantize_linear,
)
from polyquant_row_scales._modules import KERNEL, GemmaLinear, RowLinear
from polyquant_row_scales.options import EetqOptions, GemmaOptions
from polyquant_row_scales.planning import EMBEDDING, plan_layers

LAYOUT = (
    "the file does not record how EETQ's kernels order weights: it is read as GPUs of compute capability 7.5 to 8.9 "
    "write it; one written on 7.0 would answer with noise"
)
ROUNDED = "activations of {} of {} layers are rounded to int8, by the ranges that the checkpoint has for them"
CACHE_SCALES = re.compile(r"\.[kv]_cache_scale$")
"""Of a cache of keys and values in few bits, which transformers leaves out too."""


def load(request: LoadRequest, config: EetqOptions | GemmaOptions) -> LoadedModel:
    if request.source.stored_quantization:
        return _read(request, config)
    own = _options_of(config)
    names = quantized_modules(plan_layers(request.weights, config))

    def make(name: str, module: Any) -> Any:
        options = own(name)
        return (quantize_linear if hasattr(module, "in_features") else quantize_embedding)(module, options)  # type: ignore[arg-type]

    model = checkpoints.quantize_layers(request, resolved_dtype(config), names, make, by_rows=True)
    return LoadedModel(model=model, config=config, kernel=KERNEL)


def save(loaded: LoadedModel, out: Path) -> Path:
    """Under the names transformers gives them, EETQ's weights in the order of its kernels."""
    tensors = dict(loaded.model.state_dict())
    for name, module in loaded.model.named_modules():
        if type(module) is RowLinear:
            tensors[f"{name}.weight"] = eetq_of_rows(module.weight.detach())
    saved = checkpoints.save(loaded, out, tensors)
    if isinstance(loaded.config, GemmaOptions) and loaded.config.modules:
        _in_order(saved / "config.json", loaded.config.to_stored()["module_quant_configs"])
    return saved


def _in_order(path: Path, modules: Mapping[str, Any]) -> None:
    """Patterns of modules as they are tried: transformers writes them sorted, and the first that fits counts."""
    content = json.loads(path.read_text())
    content["quantization_config"]["module_quant_configs"] = modules
    path.write_text(json.dumps(content, indent=2) + "\n")


def _read(request: LoadRequest, config: EetqOptions | GemmaOptions) -> LoadedModel:
    wanted = resolved_dtype(config)
    eetq = isinstance(config, EetqOptions)
    scales = "weight_scales" if eetq else "weight_scale"
    config, notes = checkpoints.as_packed(config, request, (scales,))
    if isinstance(config, GemmaOptions):
        _require_embeddings(request, config)
    own, dtype = _options_of(config), getattr(torch, wanted)

    def make(name: str, module: Any, tensors: dict[str, torch.Tensor]) -> Any:
        if hasattr(module, "in_features"):
            return linear_from_tensors(module, own(name), dtype, tensors)
        return embedding_from_tensors(module, own(name), dtype, tensors)  # type: ignore[arg-type]

    def check(name: str, tensor: torch.Tensor) -> None:
        if tensor.element_size() == 1:
            raise ModelError(f"{request.source.name}: {name} is {tensor.dtype}, and has no {scales} beside it")

    names = quantized_modules(plan_layers(request.weights, config))
    model = checkpoints.read_layers(
        request, wanted, names, make, check=check,
        leave_out=lambda name: not eetq and bool(CACHE_SCALES.search(name)),
    )  # fmt: skip
    if eetq:
        return LoadedModel(model=model, config=config, kernel=KERNEL, notes=[*notes, LAYOUT])
    layers = [module for module in model.modules() if isinstance(module, GemmaLinear)]
    if count := sum(layer.rounds_activations for layer in layers):
        notes.append(ROUNDED.format(count, len(layers)))
    kernel = next((layer.kernel for layer in layers if layer.kernel != KERNEL), KERNEL)
    return LoadedModel(model=model, config=config, kernel=kernel, notes=notes)


def _options_of(config: EetqOptions | GemmaOptions) -> Any:
    """Name of a module -> the options that it has."""
    return config.of_module if isinstance(config, GemmaOptions) else lambda name: config


def _require_embeddings(request: LoadRequest, config: GemmaOptions) -> None:
    """Raises ConfigError where embeddings are integers and the config says that they are not, or the other way."""
    found = checkpoints.packed_modules(request.source, EMBEDDING[:1])
    planned = {module_of(weight) for weight in request.weights if weight.role == "embedding"}
    planned = {name for name in planned if config.quantize_embeddings and name not in config.skip}
    if found != planned:
        raise ConfigError.of_unfit(
            f"quantize_embeddings is {config.quantize_embeddings}, and embeddings of integers in the checkpoint are "
            f"{', '.join(sorted(found)) or 'none'}",
            [],
        )
