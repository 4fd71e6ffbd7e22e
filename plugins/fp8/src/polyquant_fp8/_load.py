"""Quantizes layer by layer, and reads and writes checkpoints: transformers dequantizes them where no GPU is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from polyquant.errors import ConfigError, ModelError
from polyquant.plugin import (
    LoadedModel,
    LoadRequest,
    checkpoints,
    dense_linears,
    experts,
    module_of,
    quantized_modules,
    resolved_dtype,
)

from polyquant_fp8._layers import expert_from_tensors, linear_from_tensors, quantize_linear, require_whole_blocks
from polyquant_fp8._modules import KERNEL
from polyquant_fp8.options import Float8Options
from polyquant_fp8.planning import is_fp4, is_stack, plan_layers

SCALE = "scale"  # what DeepSeek-V4 calls its scales
ACTIVATIONS = (
    "activations stay in {}: the checkpoint asks for {} FP8 activations, which GPU kernels round to; "
    "emulate_activations=True (--emulate-activations) rounds them here too"
)


def load(request: LoadRequest, config: Float8Options) -> LoadedModel:
    if request.source.stored_quantization:
        return _read(request, config)
    if config.static_activations:
        raise ConfigError("activation_scheme 'static' needs scales that a checkpoint brings; quantize with 'dynamic'")
    names = quantized_modules(plan_layers(request.weights, config))
    model = checkpoints.quantize_layers(
        request, resolved_dtype(config), names, lambda _, linear: quantize_linear(linear, config), by_rows=True
    )
    return LoadedModel(model=model, config=config, kernel=KERNEL)


def save(loaded: LoadedModel, out: Path) -> Path:
    """Under the names transformers gives them: weight and scales of each layer.

    Experts that a checkpoint had one by one are so again. Those that were dense are so in the file, and listed: other
    readers take them for FP8 else.
    """
    stored, config = dict(loaded.model.config.quantization_config), loaded.config
    weights = loaded.settled.weights if loaded.settled else ()
    fused = [each for each in weights if each.role == "experts" and not is_stack(each) and not config.skips(each)]
    if fused:
        dense = [*config.skip, *dense_linears(weights, config), *map(module_of, fused)]
        stored |= {"modules_to_not_convert": list(dict.fromkeys(dense)), "skip_modules": config.stored_skip}
    if any(map(is_fp4, weights)):
        stored["expert_dtype"] = "fp4"
    tensors = experts.as_stored(loaded, _named_as_stored(loaded))
    return checkpoints.save(loaded, out, tensors, stored)


def _named_as_stored(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """The state dict, the scales of experts that are stored one by one under the name that they have there."""
    names, own = loaded.request.names if loaded.request else {}, loaded.config.scale_name
    parts = (experts.stored_part(name, names) for name in names if name.endswith(f".{SCALE}"))
    renamed = {f"{part.stack}.{own}": f"{part.stack}.{SCALE}" for part in parts if part}
    return {renamed.get(name, name): tensor for name, tensor in loaded.model.state_dict().items()}


def _read(request: LoadRequest, config: Float8Options) -> LoadedModel:
    source, wanted = request.source, resolved_dtype(config)
    config, notes = checkpoints.as_packed(config, request, (config.scale_name, SCALE), beside={SCALE: "weight"})

    dtype = getattr(torch, wanted)

    def of_one(linear: Any, tensors: dict[str, torch.Tensor]) -> Any:
        return linear_from_tensors(linear, config, dtype, tensors)

    def of_expert(linear: Any, tensors: dict[str, torch.Tensor]) -> Any:
        return expert_from_tensors(linear, config, dtype, tensors)

    def make(_: str, linear: Any, tensors: dict[str, torch.Tensor]) -> Any:
        if isinstance(linear, torch.Tensor):
            require_whole_blocks(linear, tensors, config)
            return experts.stack(linear, tensors, of_expert)
        return of_one(linear, tensors)

    usual = experts.part_of(request.names)

    def part(name: str) -> tuple[str, str]:
        home, short = usual(name)
        own = short.rpartition(".")
        return home, f"{own[0]}{own[1]}{config.scale_name}" if own[2] == SCALE else short

    def check(name: str, tensor: torch.Tensor) -> None:
        if tensor.element_size() == 1 and tensor.is_floating_point():
            raise ModelError(f"{source.name}: {name} is {tensor.dtype}, and has no {config.scale_name} beside it")

    plans = [plan for plan in plan_layers(request.weights, config) if plan.quantized]
    names = [plan.name if plan.role == "experts" else module_of(plan) for plan in plans]
    model = checkpoints.read_layers(request, wanted, names, make, part=part, check=check)
    if not request.emulate_activations:
        notes.append(ACTIVATIONS.format(wanted, "static" if config.static_activations else "dynamic"))
    return LoadedModel(model=model, config=config, kernel=KERNEL, notes=notes)
