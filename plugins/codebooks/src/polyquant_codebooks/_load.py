"""Reads and writes checkpoints of the formats; HIGGS quantizes dense ones, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from polyquant.plugin import LoadedModel, LoadRequest, checkpoints, quantized_modules, resolved_dtype

from polyquant_codebooks._layers import MODULES, linear_from_tensors
from polyquant_codebooks._modules import CodebookLinear
from polyquant_codebooks.exl3._modules import SLOW, with_found_bits
from polyquant_codebooks.exl3.options import Exl3Options
from polyquant_codebooks.higgs._quantize import quantize_linear
from polyquant_codebooks.higgs.options import HiggsOptions
from polyquant_codebooks.options import CodebookOptions
from polyquant_codebooks.planning import plan_layers


def load(request: LoadRequest, config: CodebookOptions) -> LoadedModel:
    if request.source.stored_quantization:
        return _read(request, config)
    assert isinstance(config, HiggsOptions)  # the others' cards say that they make none
    names = quantized_modules(plan_layers(request.weights, config))
    config = config.with_templates(names)
    model = checkpoints.quantize_layers(
        request,
        resolved_dtype(config),
        names,
        lambda name, linear: quantize_linear(name, linear, config),
        by_rows=True,
    )
    return LoadedModel(model=model, config=config, kernel=MODULES[type(config)].kernel)


def save(loaded: LoadedModel, out: Path) -> Path:
    """Under the names that the format has for them."""
    layers = {name: module for name, module in loaded.model.named_modules() if isinstance(module, CodebookLinear)}
    tensors = {}
    for name, tensor in loaded.model.state_dict().items():
        home, _, short = name.rpartition(".")
        tensors[f"{home}.{layers[home].stored.get(short, short)}" if home in layers else name] = tensor
    return checkpoints.save(loaded, out, tensors)


def _read(request: LoadRequest, config: CodebookOptions) -> LoadedModel:
    wanted, kind = resolved_dtype(config), MODULES[type(config)]
    config, notes = checkpoints.as_packed(config, request, (config.mark,))
    if isinstance(config, Exl3Options):
        config, notes = with_found_bits(config, request), [*notes, SLOW]

    def make(name: str, linear: Any, tensors: dict[str, torch.Tensor]) -> CodebookLinear:
        return linear_from_tensors(name, linear, config, getattr(torch, wanted), tensors)

    def owner(module: str) -> str:
        home, _, short = module.rpartition(".")
        return home if short in config.inside else module

    names = quantized_modules(plan_layers(request.weights, config))
    model = checkpoints.read_layers(request, wanted, names, make, owner=owner)
    return LoadedModel(model=model, config=config, kernel=kind.kernel, notes=notes)
