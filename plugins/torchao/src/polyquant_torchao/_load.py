"""Loads and saves models through transformers' torchao path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from polyquant.errors import CheckpointConflict
from polyquant.plugin import LoadedModel, LoadRequest, checkpoints, is_packed, resolved_dtype
from torchao.utils import TorchAOBaseTensor

from polyquant_torchao._checks import require_sound
from polyquant_torchao._layers import kernel
from polyquant_torchao._library import quantize_config
from polyquant_torchao.options import TorchAoOptions
from polyquant_torchao.planning import plan_layers


def load(request: LoadRequest, config: TorchAoOptions) -> LoadedModel:
    dtype = resolved_dtype(config)
    if request.source.stored_quantization:
        require_sound(request, config)
        model = checkpoints.load_causal_lm(request, dtype)
        model.config.quantization_config.compute_dtype = dtype
        _require_dtype(model, getattr(torch, dtype), request.source.name)
        _keep_saveable(model)
    else:
        planned = plan_layers(request.weights, config)  # raises for a group size that does not fit
        model = checkpoints.load_causal_lm(request, dtype, quantize_config(config, planned))
        model.config.quantization_config.modules_to_not_convert = config.stored_skip
    notes = []
    packed = is_packed(config) and all(plan.packed for plan in plan_layers(request.weights, config) if plan.quantized)
    if config.weights == "int4" and not packed:
        notes.append(
            "weights have 4-bit values but are stored in int8, a byte each: torchao 0.18 has no int4 packing for CPU"
        )
    return LoadedModel(model=model, config=config, kernel=kernel(config.scheme), notes=notes)


def save(loaded: LoadedModel, out: Path) -> Path:
    return checkpoints.save_pretrained(loaded, out)


def _require_dtype(model: Any, dtype: torch.dtype, name: str) -> None:
    """A stored tensor subclass computes in the dtype it was made with. Raises CheckpointConflict for another one."""
    weights = (weight for weight in model.parameters() if isinstance(weight, TorchAOBaseTensor))
    stored = next((weight.dtype for weight in weights if weight.dtype != dtype), dtype)
    if stored != dtype:
        has = str(stored).removeprefix("torch.")
        raise CheckpointConflict(
            f"{name} was quantized for {has}, and torchao cannot change that: use compute_dtype={has!r}"
        )


def _keep_saveable(model: Any) -> None:
    """Forget the reading of torchao's tensors, which transformers 5.23 would try to undo on saving and cannot."""
    conversions = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [each for each in conversions if not _reads_torchao(each)] or None


def _reads_torchao(conversion: Any) -> bool:
    return any(type(operation).__name__ == "TorchAoDeserialize" for operation in getattr(conversion, "operations", ()))
