"""How AutoRound's modules store their weights after loading."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from polyquant.plugin import LayerInfo, LoadedModel, layouts
from polyquant.plugin.layers import (
    PackedWeight,
    Quantized,
    describe,
    differentiable,
    frozen_for_adapters,
    layer_tensors,
)
from polyquant.plugin.packing import pack_awq, pack_gptq

from polyquant_auto_round._kernels import is_fast, multiply, name, require_middle
from polyquant_auto_round.options import AutoRoundOptions, Packing


class StoredLayer(torch.nn.Module):
    """A layer's tensors as the checkpoint has them, for `pack`: nothing here multiplies with them."""

    def __init__(
        self, linear: Any, tensors: dict[str, torch.Tensor], layout: Packing, config: AutoRoundOptions
    ) -> None:
        """linear: the dense layer, in the compute dtype. Raises ModelError where the tensors do not fit."""
        super().__init__()
        self.outfeatures, self.infeatures = shape = linear.out_features, linear.in_features
        self.layout, self.bits, self.group_size, self.sym = layout, config.bits, config.group_size, config.sym
        self.polyquant_scheme = config.scheme
        tensors_of = layouts.awq_tensors if layout == "awq" else layouts.gptq_tensors
        expected = {
            part: (held.shape, "float" if part == "scales" else "int32")
            for part, held in tensors_of(shape, config.bits, config.group_size).items()
            if part != "g_idx"
        }
        for part, tensor in layer_tensors(linear, tensors, expected).items():
            self.register_buffer(part, tensor.to(linear.bias.dtype) if part == "bias" else tensor)


def describe_layers(model: Any) -> list[LayerInfo]:
    return describe(model, _quantized, skipped=model.config.quantization_config["skip_modules"])


def prepare_for_training(loaded: LoadedModel) -> Any:
    """Freeze, recompute activations in the backward pass, and let gradients pass auto-round-lib's matmul."""
    pass_gradients(loaded.model)
    return frozen_for_adapters(loaded.model)


def pass_gradients(model: Any) -> None:
    """Let gradients pass auto-round-lib's matmul, which has none."""
    for module in model.modules():
        if hasattr(module, "polyquant_scheme") and is_fast(module.bits) and not isinstance(module, StoredLayer):
            module.forward = partial(_forward, module)


def pack(module: StoredLayer) -> PackedWeight:
    """Of a symmetric layer zero points are in the middle, whether they are stored less one or not."""
    if module.sym:
        require_middle(module.qzeros, module.bits)
    parts = (module.qweight, None if module.sym else module.qzeros, module.scales)
    if module.layout == "awq":
        return pack_awq(*parts, module.group_size, sym=module.sym)
    less_one = module.layout == "gptq"
    return pack_gptq(*parts, None, module.bits, module.group_size, sym=module.sym, less_one=less_one)


def _forward(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    rows = differentiable(partial(multiply, layer), inputs.reshape(-1, layer.infeatures))
    outputs = rows.reshape(*inputs.shape[:-1], layer.outfeatures)
    return outputs + layer.bias.to(outputs.dtype) if layer.bias.numel() else outputs


def _quantized(module_name: str, module: Any) -> Quantized | None:
    scheme = getattr(module, "polyquant_scheme", "")
    if not scheme:
        return None
    return Quantized((module.outfeatures, module.infeatures), module.bits, scheme, name(module.bits))
