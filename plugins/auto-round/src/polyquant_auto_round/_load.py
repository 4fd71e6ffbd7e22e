"""Reads checkpoints into packed layers: every tensor is checked by name and shape on the way."""

from __future__ import annotations

from typing import Any

import torch
from polyquant.errors import ModelError
from polyquant.plugin import LoadedModel, LoadRequest, checkpoints, quantized_modules, resolved_dtype
from polyquant.plugin.layers import gptq_tensors, layer_tensors

from polyquant_auto_round import _kernels
from polyquant_auto_round._kernels import FAST_BITS, empty_layer, is_fast, settle
from polyquant_auto_round.options import AutoRoundOptions, packing
from polyquant_auto_round.planning import plan_layers


def load(request: LoadRequest, config: AutoRoundOptions) -> LoadedModel:
    source, wanted = request.source, resolved_dtype(config)
    layout = packing(source.stored_quantization)
    config, notes = checkpoints.as_packed(config, request, ("qweight", "qzeros", "scales"))
    floats = torch.float32 if is_fast(config.bits) else getattr(torch, wanted)  # auto-round-lib keeps float32

    def make(name: str, linear: Any, tensors: dict[str, torch.Tensor]) -> Any:
        layer = empty_layer(linear, layout, config)
        layer.polyquant_scheme = config.scheme
        tensors = gptq_tensors(linear, tensors, config.group_size)
        _require_plain_order(layer, tensors.pop("g_idx"))
        expected = {
            key: (tuple(buffer.shape), "float" if buffer.is_floating_point() else "int32")
            for key, buffer in layer.named_buffers()
        }
        for key, tensor in layer_tensors(linear, tensors, expected).items():
            setattr(layer, key, tensor.to(floats) if tensor.is_floating_point() else tensor)
        settle(layer)
        return layer

    names = quantized_modules(plan_layers(request.weights, config))
    model = checkpoints.read_layers(request, wanted, names, make)
    if not is_fast(config.bits):
        notes.append(_slow(config.bits))
    return LoadedModel(model=model, config=config, kernel=_kernels.name(config.bits), notes=notes)


def _require_plain_order(layer: Any, group_of_column: torch.Tensor) -> None:
    """Raises ModelError where columns are reordered."""
    plain = torch.arange(layer.infeatures) // layer.group_size
    if not torch.equal(group_of_column.long(), plain):
        raise ModelError("its columns are reordered; load it with backend='gptq'")


def _slow(bits: int) -> str:
    why = "auto-round-lib is not there" if bits in FAST_BITS else f"auto-round-lib has no kernel for {bits} bits"
    return f"{why}: weights are unpacked in every forward pass, about ten times slower to generate with"
