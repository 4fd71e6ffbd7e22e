"""Quantizes layer by layer, and reads and writes checkpoints, fused experts too."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec
import torch
from polyquant.errors import ModelError
from polyquant.plugin import LoadedModel, LoadRequest, checkpoints, experts, module_of, resolved_dtype
from polyquant.plugin.layers import LinearExperts

from polyquant_mx._layers import (
    as_stored,
    experts_from_tensors,
    experts_of,
    experts_one_by_one,
    in_file,
    linear_from_tensors,
    linear_of,
    stored_one_by_one,
    stored_tensors,
)
from polyquant_mx._modules import KERNEL, MxLinear
from polyquant_mx.formats import routers
from polyquant_mx.options import ModelOptOptions, MxOptions
from polyquant_mx.planning import plan_layers, takes

BY_MODEL = ("mxfp4",)
"""quant_methods whose files transformers reads where only experts are quantized."""


def load(request: LoadRequest, config: MxOptions) -> LoadedModel:
    stored = bool(request.source.stored_quantization)
    weights = {_home(weight): weight for weight in request.weights}
    if stored and not any(weight.parts for weight in request.weights):
        raise _nothing_packed(request, config)
    names = [_home(plan) for plan in plan_layers(request.weights, config) if plan.quantized]
    notes: list[str] = []
    if stored:
        config, notes = _with_dense(request, config, set(names))
        model = _read(request, config, names, notes)
    else:

        def make(name: str, dense: Any) -> Any:
            weight = weights[name]
            scheme = config.scheme_for(weight)
            if weight.role == "experts":
                return experts_of(dense, scheme, transposed=weight.stacked == "in_out")
            return linear_of(dense, scheme)

        model = checkpoints.quantize_layers(request, resolved_dtype(config), names, make, by_rows=True)
    model.config.quantization_config = config.to_stored()
    return LoadedModel(model=model, config=config, kernel=KERNEL, notes=notes)


def save(loaded: LoadedModel, out: Path) -> Path:
    """Under the names of the format: transformers', ModelOpt's or FP-Quant's; experts one by one where they came so."""
    config: Any = loaded.config
    tensors, linears = dict(loaded.model.state_dict()), False
    names = loaded.request.names if loaded.request else {}
    single = {part.stack for name in names if (part := experts.stored_part(name, names))}
    for name, module in loaded.model.named_modules():
        if not isinstance(module, (MxLinear, LinearExperts)):
            continue
        linears |= isinstance(module, MxLinear)
        for short in module._parameters:
            if short != "bias":
                tensors.pop(f"{name}.{short}", None)
        tensors |= {key: in_file(key, tensor, config) for key, tensor in _stored(name, module, config, single).items()}
    tensors = experts.as_stored(loaded, tensors)
    tensors |= {name: tensors[name].reshape(()) for name in names if name in tensors and tensors[name].shape == (1,)}
    named = checkpoints.MODEL if config.method in BY_MODEL and not linears else ""
    stored = dict(loaded.model.config.quantization_config)
    if isinstance(config, ModelOptOptions):
        weights = loaded.settled.weights if loaded.settled else ()
        stored = config.with_layers(stored, [one for one in weights if takes(one, config)])
    return checkpoints.save(loaded, out, tensors, stored, named=named)


def _stored(name: str, module: Any, config: MxOptions, single: Collection[str]) -> dict[str, torch.Tensor]:
    """The tensors of a layer or a stack by their names in a file. single: stacks that were read one by one."""
    layout = config.layout
    if isinstance(module, MxLinear):
        return {f"{name}.{short}": tensor for short, tensor in stored_tensors(module, layout.linear).items()}
    if name in single:
        return {f"{name}.{short}": tensor for short, tensor in stored_one_by_one(module, layout.linear).items()}
    return {
        f"{name}{layout.stacked[short]}": as_stored(short, tensor.detach(), module.like.scheme, module.count)
        for short, tensor in module.named_parameters()
    }


def _read(request: LoadRequest, config: MxOptions, names: list[str], notes: list[str]) -> Any:
    layout, source, dtype = config.layout, request.source, resolved_dtype(config)
    weights = {_home(weight): weight for weight in request.weights}
    stacked = {f"{name}{end}": (name, end) for name in names if weights[name].role == "experts"
               for end in layout.stacked.values()}  # fmt: skip
    ignored: list[str] = []

    single = experts.part_of(request.names)

    def part(name: str) -> tuple[str, str]:
        return stacked.get(name) or single(name)

    def make(name: str, dense: Any, tensors: dict[str, torch.Tensor]) -> Any:
        weight = weights[name]
        scheme = config.scheme_for(weight)
        if weight.role == "experts":
            if any("." in short for short in tensors):
                return experts_one_by_one(dense, scheme, layout, tensors)
            return experts_from_tensors(dense, scheme, layout, tensors, transposed=weight.stacked == "in_out")
        ignored.extend(f"{name}.{short}" for short in layout.ignored if tensors.pop(short, None) is not None)
        return linear_from_tensors(dense, scheme, layout, getattr(torch, dtype), tensors)

    def check(name: str, tensor: torch.Tensor) -> None:
        if tensor.element_size() == 1 and tensor.dtype != torch.bool:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(f"{source.name}: {name} is {kind}, and has no {layout.linear['scales']} beside it")

    model = checkpoints.read_layers(request, dtype, names, make, part=part, check=check)
    if ignored:
        notes.append(f"{len(ignored)} scales of a quantized key-value cache are not used: {', '.join(ignored[:3])}")
    return model


def _with_dense(request: LoadRequest, config: MxOptions, packed: set[str]) -> tuple[MxOptions, list[str]]:
    """`config` with `skip` as the checkpoint has it; a note where that differs. Raises ModelError where nothing is
    packed.
    """
    if not packed:
        raise _nothing_packed(request, config)
    if packed == {_home(weight) for weight in request.weights if takes(weight, config)}:
        return config, []
    whole = [weight for weight in request.weights if not weight.tied_to and _home(weight) not in packed]
    dense = [module_of(weight) for weight in whole if weight.role in ("linear", "experts")]
    heads = [module_of(weight) for weight in whole if weight.role == "head"]
    skip = tuple(dict.fromkeys([*dense, *heads, *(routers(request.weights) if dense else ())]))
    notes = [f"{len(skip)} layers are dense in the checkpoint: {', '.join(skip[:3])}"] if dense else []
    return msgspec.structs.replace(config, skip=skip, skip_defaults=False), notes


def _nothing_packed(request: LoadRequest, config: MxOptions) -> ModelError:
    names = config.layout.linear["scales"], config.layout.stacked.get("scales", "")
    return ModelError(
        f"{request.source.name}: its config says that it is quantized with {config.method!r}, and no layer in its "
        f"files has a tensor called {' or '.join(filter(None, names))}: fetch the weights that belong to this config"
    )


def _home(weight: Any) -> str:
    """What a quantized layer is called: its module, or the tensor of fused experts."""
    return weight.name if weight.role == "experts" else module_of(weight)
