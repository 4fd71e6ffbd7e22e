"""Quantizes layer by layer, and reads and writes checkpoints with sinq's names of tensors.

Not through transformers: its way patches from_pretrained and save_pretrained for the whole process, and what it saves
does not load back.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from polyquant.errors import ConfigError
from polyquant.plugin import LoadedModel, LoadRequest, checkpoints, quantized_modules, resolved_dtype

from polyquant_sinq._layers import KERNEL, SinqLinear, is_rounded_plainly, linear_from_tensors, quantize_linear
from polyquant_sinq.options import SinqOptions
from polyquant_sinq.planning import STORED_NAMES, plan_layers

OWN_NAMES = {stored: name for name, stored in STORED_NAMES.items()}
PATCHED = (
    "sinq's sitecustomize imports transformers at every start of Python in this environment, which takes seconds, and "
    "patches its from_pretrained and save_pretrained; polyquant needs neither: set SINQ_AUTO_PATCH=0"
)


def load(request: LoadRequest, config: SinqOptions) -> LoadedModel:
    plain: list[bool] = []
    notes = [PATCHED] if getattr(sys.modules.get("sinq._autopatch"), "_ALREADY", False) else []
    if request.source.stored_quantization:
        packed = checkpoints.packed_modules(request.source, (STORED_NAMES["weight"],))
        config, dense = checkpoints.with_stored_skips(config, request.weights, packed, request.source)
        model, notes = _read(request, config, sorted(packed), plain), notes + dense
    else:
        model = _quantize(request, config, plain)
    if any(plain):
        heavy = f"{sum(plain)} of {len(plain)} layers have so heavy tails (kurtosis above 5)"
        notes.append(f"{heavy} that sinq rounds them plainly")
    return LoadedModel(model=model, config=config, kernel=KERNEL, notes=notes)


def save(loaded: LoadedModel, out: Path) -> Path:
    layers = {name for name, module in loaded.model.named_modules() if isinstance(module, SinqLinear)}
    tensors = {}
    for name, tensor in loaded.model.state_dict().items():
        module, _, short = name.rpartition(".")
        tensors[f"{module}.{STORED_NAMES.get(short, short)}" if module in layers else name] = tensor
    return checkpoints.save(loaded, out, tensors)


def _quantize(request: LoadRequest, config: SinqOptions, plain: list[bool]) -> Any:
    """plain: takes whether each layer is rounded plainly; the layers may become others at once."""
    if config.method != "sinq":
        raise ConfigError(
            f"method {config.method!r} is read from checkpoints only; use method='sinq' for a dense model"
        )

    def make(_: str, linear: Any) -> SinqLinear:
        layer = quantize_linear(linear, config)
        plain.append(is_rounded_plainly(layer))
        return layer

    names = quantized_modules(plan_layers(request.weights, config))
    return checkpoints.quantize_layers(request, resolved_dtype(config), names, make, on_cpu=False)


def _read(request: LoadRequest, config: SinqOptions, names: list[str], plain: list[bool]) -> Any:
    wanted = resolved_dtype(config)
    dtype, device = getattr(torch, wanted), checkpoints.single_device(request)

    def make(_: str, linear: Any, tensors: dict[str, torch.Tensor]) -> SinqLinear:
        moved = {OWN_NAMES.get(name, name): tensor.to(device) for name, tensor in tensors.items()}
        layer = linear_from_tensors(linear, config, dtype, moved)
        plain.append(is_rounded_plainly(layer))
        return layer

    return checkpoints.read_layers(request, wanted, names, make, owner=_owner)


def _owner(module: str) -> str:
    """The layer that a part belongs to: scales and zero points lie in its `meta`, `meta.scale` and `meta.zero`."""
    return f"{module}.".partition(".meta.")[0].removesuffix(".")
