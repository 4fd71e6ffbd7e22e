"""How torchao stores weights: the modules stay nn.Linear, their weight is a tensor subclass."""

from __future__ import annotations

from typing import Any

import torch
from polyquant.errors import ModelError, UnsupportedOperation
from polyquant.plugin import LayerInfo, LoadedModel
from polyquant.plugin.layers import PackedWeight, Quantized, describe, frozen_for_adapters, pack_weight
from torchao.quantization import quantize_
from torchao.utils import TorchAOBaseTensor

from polyquant_torchao._library import torchao_config
from polyquant_torchao.options import TorchAoOptions

NAMES = {"IntxUnpackedToInt8Tensor": "int4-in-int8", "Int8Tensor": "int8", "Float8Tensor": "float8"}
KERNELS = {
    "int8": "torchao int8 scaled matmul",
    "int8-dynamic": "torchao int8 matmul",
    "int4-in-int8": "torchao dequantize and torch matmul",
    "float8": "torchao dequantize and torch matmul",
}
ZERO = 8  # the code of four bits that stands for 0


def describe_layers(model: Any) -> list[LayerInfo]:
    skipped = getattr(model.config.quantization_config, "modules_to_not_convert", None) or ()
    return describe(model, _quantized, skipped=skipped)


def prepare_for_training(loaded: LoadedModel) -> Any:
    """Freeze, and recompute activations in the backward pass.

    Raises UnsupportedOperation for quantized activations: rounding passes no gradient to the adapters below, silently.
    """
    if getattr(loaded.config, "dynamic_activations", False):
        raise UnsupportedOperation(
            "no gradient passes through dynamic_activations; load with weights='int8' alone to train"
        )
    return frozen_for_adapters(loaded.model)


def pack(module: torch.nn.Linear) -> PackedWeight:
    """Raises ModelError for zero points, which torchao stores and never fits with the configs that are read."""
    weight: Any = module.weight
    if scheme(weight) == "float8":
        return pack_weight(weight.qdata.detach(), weight.scale.detach())
    if weight.zero_point is not None and bool(weight.zero_point.any()):
        raise ModelError("it has zero points, and torchao makes such weights without")
    codes, scales = weight.qdata.detach(), weight.scale.detach()
    if scheme(weight) == "int8":
        return pack_weight(codes, scales)
    return pack_weight((codes + ZERO).to(torch.uint8), scales, weight.block_size[1], zero=ZERO)


def quantize_linear(linear: torch.nn.Linear, config: TorchAoOptions) -> torch.nn.Linear:
    """As transformers does it."""
    quantize_(linear, torchao_config(config))
    return linear


def scheme(weight: Any) -> str:
    """int8, int8-dynamic, int4-in-int8 or float8; of any other subclass its own name."""
    name = NAMES.get(type(weight).__name__, type(weight).__name__)
    return f"{name}-dynamic" if getattr(weight, "act_quant_kwargs", None) is not None else name


def kernel(name: str) -> str:
    """What multiplies with weights of a scheme, on the CPU and on CUDA without torch.compile."""
    return KERNELS.get(name, "torchao")


def _quantized(name: str, module: Any) -> Quantized | None:
    weight = getattr(module, "weight", None)
    if not isinstance(module, torch.nn.Linear) or not isinstance(weight, TorchAOBaseTensor):
        return None
    return Quantized(tuple(weight.shape), 8, scheme(weight), kernel(scheme(weight)))
