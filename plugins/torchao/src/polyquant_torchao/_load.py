"""Loads models through transformers' torchao path. Imports torch; the library comes with `_layers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from polyquant.errors import CheckpointConflict, UnsupportedOperation
from polyquant.memory.weights import list_weights
from polyquant.models import hf
from polyquant.plugin import LoadedModel, LoadRequest, checkpoints, layers, resolved_dtype
from torchao.utils import TorchAOBaseTensor

from polyquant_torchao._layers import kernel
from polyquant_torchao.options import TorchAoOptions
from polyquant_torchao.planning import plan_layers


def load(request: LoadRequest, config: TorchAoOptions) -> LoadedModel:
    dtype, trusted = resolved_dtype(config), request.trust_remote_code
    if request.source.stored_quantization:
        model = checkpoints.load_causal_lm(request, dtype)
        model.config.quantization_config.compute_dtype = dtype
        _require_dtype(model, getattr(torch, dtype), request.source.name)
        _keep_saveable(model)
    else:
        plan_layers(list_weights(hf.skeleton(request.source, dtype, trust_remote_code=trusted)), config)
        model = checkpoints.load_causal_lm(request, dtype, config.native())
    notes = []
    if config.weights == "int4":
        notes.append(
            "weights have 4-bit values but are stored in int8, a byte each: torchao 0.18 has no int4 packing for CPU"
        )
    tokenizer = checkpoints.load_tokenizer(request.source, trust_remote_code=trusted)
    return LoadedModel(model=model, tokenizer=tokenizer, config=config, kernel=kernel(config.scheme), notes=notes)


def save(loaded: LoadedModel, out: Path) -> Path:
    return checkpoints.save_pretrained(loaded, out)


def prepare_for_training(loaded: LoadedModel) -> Any:
    """Freeze, and recompute activations in the backward pass.

    Raises UnsupportedOperation for quantized activations: rounding passes no gradient to the adapters below, silently.
    """
    if getattr(loaded.config, "dynamic_activations", False):
        raise UnsupportedOperation(
            "no gradient passes through dynamic_activations; load with weights='int8' alone to train"
        )
    return layers.frozen_for_adapters(loaded.model)


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
