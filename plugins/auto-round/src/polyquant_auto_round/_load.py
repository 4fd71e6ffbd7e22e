"""Reads checkpoints into packed layers: every tensor is checked by name and shape on the way."""

from __future__ import annotations

from typing import Any

import torch
from polyquant.errors import ModelError
from polyquant.plugin import (
    LoadedModel,
    LoadRequest,
    checkpoints,
    is_packed,
    quantized_modules,
    repacked_modules,
    resolved_dtype,
)
from polyquant.plugin.layers import gptq_tensors, layer_tensors

from polyquant_auto_round import _kernels
from polyquant_auto_round._kernels import FAST_BITS, empty_layer, is_fast, settle
from polyquant_auto_round._layers import StoredLayer, pass_gradients
from polyquant_auto_round.options import AutoRoundOptions, packing
from polyquant_auto_round.planning import plan_layers


def load(request: LoadRequest, config: AutoRoundOptions) -> LoadedModel:
    source, wanted = request.source, resolved_dtype(config)
    layout = packing(source.stored_quantization)
    config, notes = checkpoints.as_packed(config, request, ("qweight", "qzeros", "scales"))
    plans = plan_layers(request.weights, config)
    repacked = repacked_modules(plans, config)
    floats = torch.float32 if is_fast(config.bits) else getattr(torch, wanted)  # auto-round-lib keeps float32

    def make(name: str, linear: Any, tensors: dict[str, torch.Tensor]) -> Any:
        tensors = gptq_tensors(linear, tensors, config.group_size)
        _require_plain_order(linear, config.group_size, tensors.pop("g_idx"))
        if name in repacked:
            return StoredLayer(linear, tensors, layout, config)
        layer = empty_layer(linear, layout, config)
        layer.polyquant_scheme = config.scheme
        expected = {
            key: (tuple(buffer.shape), "float" if buffer.is_floating_point() else "int32")
            for key, buffer in layer.named_buffers()
        }
        for key, tensor in layer_tensors(linear, tensors, expected).items():
            setattr(layer, key, tensor.to(floats) if tensor.is_floating_point() else tensor)
        settle(layer)
        return layer

    names = quantized_modules(plans)
    model = checkpoints.read_layers(request, wanted, names, make)
    if is_packed(config):
        pass_gradients(model)  # of layers that stay with the library: the core prepares this model for training
    if not is_fast(config.bits) and set(names) - repacked:
        notes.append(_slow(config.bits))
    return LoadedModel(model=model, config=config, kernel=_kernels.name(config.bits), notes=notes)


def _require_plain_order(linear: Any, group_size: int, group_of_column: torch.Tensor) -> None:
    """Raises ModelError where columns are reordered."""
    plain = torch.arange(linear.in_features) // (linear.in_features if group_size == -1 else group_size)
    if not torch.equal(group_of_column.long(), plain):
        raise ModelError("its columns are reordered; load it with backend='gptq'")


def _slow(bits: int) -> str:
    why = "auto-round-lib is not there" if bits in FAST_BITS else f"auto-round-lib has no kernel for {bits} bits"
    return f"{why}: weights are unpacked in every forward pass, about ten times slower to generate with"
