"""Quantizes layer by layer, and reads and writes checkpoints with the library's names of tensors.

Not through transformers: on a CPU the library gives tensors whose shapes 5.23 refuses (an amax without dimensions,
weights padded to 128 rows).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import msgspec
import torch
from polyquant.errors import ModelError
from polyquant.memory.weights import list_weights
from polyquant.models import hf
from polyquant.plugin import Dtype, LoadedModel, LoadRequest, WeightInfo, checkpoints, is_linear, layers, resolved_dtype
from tqdm import tqdm

from polyquant_fouroversix._layers import kernel, linear_from_tensors, quantized_linear, stored_tensors
from polyquant_fouroversix.modules import FouroversixLinear
from polyquant_fouroversix.options import FouroversixOptions
from polyquant_fouroversix.planning import STORED_NAMES, plan_layers

CODES = STORED_NAMES["weight"]


def load(request: LoadRequest, config: FouroversixOptions) -> LoadedModel:
    source = request.source
    tokenizer = checkpoints.load_tokenizer(source, trust_remote_code=request.trust_remote_code)
    weights = list_weights(hf.skeleton(source, resolved_dtype(config), trust_remote_code=request.trust_remote_code))
    notes: list[str] = []
    if source.stored_quantization:
        config, notes = checkpoints.with_stored_skips(
            config, weights, checkpoints.packed_modules(source, (CODES,)), source
        )
        model = _read(request, config, _names(weights, config))
    else:
        model = _quantize(request, config, _names(weights, config))
    model.config.quantization_config = config.stored(_dense(weights, config))
    return LoadedModel(model=model, tokenizer=tokenizer, config=config, kernel=kernel(config), notes=notes)


def save(loaded: LoadedModel, out: Path) -> Path:
    layers = {name: module for name, module in loaded.model.named_modules() if isinstance(module, FouroversixLinear)}
    tensors = {
        name: tensor
        for name, tensor in loaded.model.state_dict().items()
        if name.rpartition(".")[0] not in layers or name.endswith(".bias")
    }
    for name, layer in layers.items():
        tensors |= {f"{name}.{short}": tensor for short, tensor in stored_tensors(layer).items()}
    return checkpoints.save(loaded, out, tensors, dict(loaded.model.config.quantization_config))


def prepare_for_training(loaded: LoadedModel) -> Any:
    """Freeze, and recompute activations in the backward pass."""
    return layers.frozen_for_adapters(loaded.model)


def _names(weights: list[WeightInfo], config: FouroversixOptions) -> list[str]:
    """Modules to quantize."""
    return [plan.name.rpartition(".")[0] for plan in plan_layers(weights, config) if plan.quantized]


def _dense(weights: list[WeightInfo], config: FouroversixOptions) -> list[str]:
    """Linear modules that stay dense, on request or by default."""
    everything = msgspec.structs.replace(config, skip=(), skip_defaults=False)
    tied = [weight.name.rpartition(".")[0] for weight in weights if weight.tied_to]
    dense = [w.name.rpartition(".")[0] for w in weights if is_linear(w, everything) and not is_linear(w, config)]
    return list(dict.fromkeys([*config.skip, *dense, *tied]))


def _quantize(request: LoadRequest, config: FouroversixOptions, names: list[str]) -> Any:
    """The dense model, loaded in the checkpoint's dtype on the CPU, its layers replaced one by one."""
    wanted: Dtype = resolved_dtype(config)
    stored = request.source.config.get("dtype") or request.source.config.get("torch_dtype")
    on_cpu = msgspec.structs.replace(request, device_map={"": "cpu"})
    model = checkpoints.load_causal_lm(on_cpu, stored if stored in get_args(Dtype) else wanted)
    for name in tqdm(names, desc="Quantizing", unit="layer", disable=not request.progress):
        model.set_submodule(name, quantized_linear(name, model.get_submodule(name), config))
    dtype = getattr(torch, wanted)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    checkpoints.place(model, request)
    return model


def _read(request: LoadRequest, config: FouroversixOptions, names: list[str]) -> Any:
    dtype = resolved_dtype(config)

    def make(name: str, module: Any, tensors: dict[str, torch.Tensor]) -> FouroversixLinear:
        try:
            return linear_from_tensors(module, config, getattr(torch, dtype), tensors)
        except ModelError as error:
            raise ModelError(f"{name} cannot be read: {error}") from error

    return checkpoints.read_layers(request, dtype, names, make)
