"""How auto-gptq's modules store their weights, and how they are made."""

from __future__ import annotations

from typing import Any

import torch
from polyquant.plugin import LayerInfo
from polyquant.plugin.layers import PackedWeight, Quantized, describe
from polyquant.plugin.packing import pack_gptq

from polyquant_autogptq._library import ORDERED, PLAIN
from polyquant_autogptq.options import AutogptqOptions


def describe_layers(model: Any) -> list[LayerInfo]:
    return describe(model, _quantized, skipped=model.config.quantization_config["skip_modules"])


def empty_layer(linear: Any, config: AutogptqOptions, dtype: torch.dtype) -> Any:
    """A packed layer on the meta device that takes the place of `linear`; its table of shifts is real."""
    kind = ORDERED if config.desc_act and config.group_size != -1 else PLAIN
    with torch.device("meta"):
        layer = kind(
            config.bits, config.group_size, linear.in_features, linear.out_features, linear.bias is not None,
            weight_dtype=dtype,
        )  # fmt: skip
    with torch.device("cpu"):
        layer.wf = kind(config.bits, 32, 32, 32, bias=False).wf
    layer.polyquant_sym = config.sym
    return layer.eval()


def kernel(layer: Any) -> str:
    """What multiplies in `layer`."""
    on_gpu = layer.qweight.device.type == "cuda" and layer.autogptq_cuda_available
    return f"auto-gptq {layer.QUANT_TYPE}" + ("" if on_gpu else ", dequantized in each pass")


def pack(module: Any) -> PackedWeight:
    """Zero points as the library's layers read them: without reordered columns, one that is stored as all ones is 0."""
    parts = (module.qweight, module.qzeros, module.scales, module.g_idx)
    ordered = isinstance(module, ORDERED)
    return pack_gptq(
        *parts, module.bits, module.group_size, sym=module.polyquant_sym, ordered=ordered, less_one=True,
        wraps=not ordered,
    )  # fmt: skip


def _quantized(name: str, module: Any) -> Quantized | None:
    if not isinstance(module, (ORDERED, PLAIN)):
        return None
    return Quantized((module.outfeatures, module.infeatures), module.bits, f"gptq{module.bits}", kernel(module))
