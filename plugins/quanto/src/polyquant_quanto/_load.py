"""Loads models through transformers' quanto path, and reads and writes quanto's own checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from optimum import quanto
from polyquant.errors import ModelError
from polyquant.plugin import LoadedModel, LoadRequest, checkpoints, resolved_dtype, unpacked
from polyquant.plugin.layers import layer_tensors
from polyquant.plugin.parts import layer_of

from polyquant_quanto._layers import QTYPES, kernel, make_safe
from polyquant_quanto._library import prepare_unpacking, quantize_config
from polyquant_quanto.options import QuantoOptions
from polyquant_quanto.planning import stored_parts

QMAP = "quanto_qmap.json"
PARTS = ("_data", "_scale", "_shift")
"""Of a quantized weight, in checkpoints."""


def load(request: LoadRequest, config: QuantoOptions) -> LoadedModel:
    notes = prepare_unpacking() if config.weight_bits < 8 else []
    if request.source.stored_quantization:
        model = _read(request, config)
    else:
        model = checkpoints.load_causal_lm(request, resolved_dtype(config), quantize_config(config))
    make_safe(model)
    if config.weights == "int2":
        notes.append(
            "int2 rounds to four levels a group and fits nothing: a small model becomes noise (SmolLM2-135M does)"
        )
    kernels = {kernel(module.weight): None for module in model.modules() if _is_frozen(module)}
    return LoadedModel(model=model, config=config, kernel=" + ".join(kernels), notes=notes)


def save(loaded: LoadedModel, out: Path) -> Path:
    """quanto's own format: its state dict in safetensors, its quantization map beside it."""
    checkpoints.save(loaded, out, dict(loaded.model.state_dict()), loaded.config.to_stored())
    quantization_map = quanto.quantization_map(loaded.model)
    (out / QMAP).write_text(json.dumps(quantization_map, indent=4))
    return out


def write_unpacked(loaded: LoadedModel, layers: Iterable[tuple[str, dict[str, torch.Tensor]]], out: Path) -> Path:
    """As the core writes it, with the quantization map that quanto's own reader asks for."""
    config: Any = loaded.config
    names: list[str] = []

    def named() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        for name, tensors in layers:
            names.append(name)
            yield name, tensors

    unpacked.write(loaded, named(), out)
    kinds = {"weights": QTYPES[config.weights].name, "activations": "none"}
    (out / QMAP).write_text(json.dumps(dict.fromkeys(names, kinds), indent=4))
    return out


def _read(request: LoadRequest, config: QuantoOptions) -> Any:
    """A saved model; scales and dense weights in the compute dtype, which is the stored one unless asked."""
    wanted, device = resolved_dtype(config), checkpoints.single_device(request)
    dtype = getattr(torch, wanted)

    def make(_: str, linear: Any, tensors: dict[str, torch.Tensor]) -> Any:
        found = layer_tensors(linear, tensors, stored_parts((linear.out_features, linear.in_features), config.weights))
        state = {key: tensor.to(device, dtype if _is_scale(tensor) else None) for key, tensor in found.items()}
        module = quanto.QLinear.qcreate(linear, QTYPES[config.weights], device="meta")
        missing, left_over = module.load_state_dict(state, strict=False, assign=True)
        if missing or left_over or not _is_frozen(module):
            raise ModelError(f"it is incomplete: {', '.join(missing + left_over)}")
        module.weight.requires_grad_(requires_grad=False)
        return module

    names = sorted({layer_of(weight) for weight in checkpoints.packed_modules(request.source, PARTS)})
    model = checkpoints.read_layers(request, wanted, names, make, owner=layer_of)
    model.config.quantization_config = quantize_config(config)
    return model


def _is_scale(tensor: torch.Tensor) -> bool:
    """Whether a layer's tensor is a scale, a shift or a bias: neither codes nor the scalar scale of activations."""
    return tensor.is_floating_point() and tensor.itemsize > 1 and tensor.dim() > 0


def _is_frozen(module: Any) -> bool:
    return isinstance(module, quanto.QLinear) and module.frozen
