"""Quantizes layer by layer, and reads and writes checkpoints with sinq's names of tensors.

Not through transformers: its way patches from_pretrained and save_pretrained for the whole process, and what it saves
does not load back.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, get_args

import torch
from polyquant.errors import ConfigError, ModelError
from polyquant.memory.weights import list_weights
from polyquant.models import hf
from polyquant.plugin import Dtype, LoadedModel, LoadRequest, checkpoints, layers, resolved_dtype
from tqdm import tqdm

from polyquant_sinq._layers import KERNEL, SinqLinear, linear_from_tensors, quantized_linear, rounded_plainly
from polyquant_sinq.options import SinqOptions
from polyquant_sinq.planning import STORED_NAMES, plan_layers

OWN_NAMES = {stored: name for name, stored in STORED_NAMES.items()}
PATCHED = (
    "sinq's sitecustomize imports transformers at every start of Python in this environment, which takes seconds, and "
    "patches its from_pretrained and save_pretrained; polyquant needs neither: set SINQ_AUTO_PATCH=0"
)


def load(request: LoadRequest, config: SinqOptions) -> LoadedModel:
    source, stored = request.source, request.source.stored_quantization
    notes = [PATCHED] if getattr(sys.modules.get("sinq._autopatch"), "_ALREADY", False) else []
    tokenizer = checkpoints.load_tokenizer(source, trust_remote_code=request.trust_remote_code)
    model = _read(request, config) if stored else _quantize(request, config)
    if stored and "skip_defaults" not in stored:  # by another tool, whose patterns are not polyquant's
        packed_layers = checkpoints.packed_modules(source, ("W_q",))
        weights = list_weights(hf.skeleton(source, resolved_dtype(config), trust_remote_code=request.trust_remote_code))
        config, dense = checkpoints.with_stored_skips(config, weights, packed_layers, source)
        notes += dense
    model.config.quantization_config = config.stored()
    plain, layers = rounded_plainly(model)
    if plain:
        notes.append(f"{plain} of {layers} layers have so heavy tails (kurtosis above 5) that sinq rounds them plainly")
    return LoadedModel(model=model, tokenizer=tokenizer, config=config, kernel=KERNEL, notes=notes)


def save(loaded: LoadedModel, out: Path) -> Path:
    layers = {name for name, module in loaded.model.named_modules() if isinstance(module, SinqLinear)}
    tensors = {}
    for name, tensor in loaded.model.state_dict().items():
        module, _, short = name.rpartition(".")
        tensors[f"{module}.{STORED_NAMES.get(short, short)}" if module in layers else name] = tensor
    return checkpoints.save(loaded, out, tensors, dict(loaded.model.config.quantization_config))


def prepare_for_training(loaded: LoadedModel) -> Any:
    """Freeze, and recompute activations in the backward pass."""
    return layers.frozen_for_adapters(loaded.model)


def _quantize(request: LoadRequest, config: SinqOptions) -> Any:
    """The dense model, its layers replaced one by one.

    It is loaded in the checkpoint's dtype: on the CPU its weights are then pages of the file, read in turn.
    """
    if config.method != "sinq":
        raise ConfigError(
            f"method {config.method!r} is read from checkpoints only; use method='sinq' for a dense model"
        )
    wanted: Dtype = resolved_dtype(config)
    weights = list_weights(hf.skeleton(request.source, wanted, trust_remote_code=request.trust_remote_code))
    names = [plan.name.rpartition(".")[0] for plan in plan_layers(weights, config) if plan.quantized]
    stored = request.source.config.get("dtype") or request.source.config.get("torch_dtype")
    model = checkpoints.load_causal_lm(request, stored if stored in get_args(Dtype) else wanted)
    dtype = getattr(torch, wanted)
    for name in tqdm(names, desc="Quantizing", unit="layer", disable=not request.progress):
        try:
            model.set_submodule(name, quantized_linear(model.get_submodule(name), config, dtype))
        except ModelError as error:
            raise ModelError(f"{request.source.name}: {name} cannot be quantized: {error}") from error
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def _read(request: LoadRequest, config: SinqOptions) -> Any:
    dtype, device = getattr(torch, resolved_dtype(config)), checkpoints.single_device(request)
    casts = request.source.stored_quantization.get("compute_dtype") != config.compute_dtype
    model = checkpoints.empty_causal_lm(request, resolved_dtype(config))
    computed = {name for name, _ in model.named_buffers()} - set(model.state_dict())
    layers: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in checkpoints.read_tensors(request.source):
        if name in computed:  # rotary frequencies, which sinq stores too
            continue
        module, _, rest = name.partition(".meta.") if ".meta." in name else name.rpartition(".")
        short = f"meta.{rest}" if ".meta." in name else rest
        layers[module][OWN_NAMES.get(short, short)] = tensor
    dense: dict[str, torch.Tensor] = {}
    for name, tensors in layers.items():
        if "scale" not in tensors:
            for key, tensor in tensors.items():
                dense[f"{name}.{key}"] = tensor.to(device, dtype if casts and tensor.is_floating_point() else None)
            continue
        try:
            moved = {key: tensor.to(device) for key, tensor in tensors.items()}
            model.set_submodule(name, linear_from_tensors(model.get_submodule(name), config, dtype, moved))
        except (AttributeError, ModelError) as error:
            raise ModelError(f"{request.source.name}: {name} cannot be read: {error}") from error
    checkpoints.fill(model, dense, request.source)
    return model.to(device)
