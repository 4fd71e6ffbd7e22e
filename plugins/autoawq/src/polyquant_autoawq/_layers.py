"""How AutoAWQ's modules store their weights, and how they are made."""

from __future__ import annotations

from typing import Any

from polyquant.plugin import LayerInfo
from polyquant.plugin.layers import PackedWeight, Quantized, describe
from polyquant.plugin.packing import pack_awq

from polyquant_autoawq._library import WQLinear_GEMM
from polyquant_autoawq.options import AutoawqOptions


def describe_layers(model: Any) -> list[LayerInfo]:
    return describe(model, _quantized, skipped=model.config.quantization_config["skip_modules"])


def empty_layer(linear: Any, config: AutoawqOptions) -> WQLinear_GEMM:
    """A packed layer on the meta device that takes the place of `linear`."""
    sizes = (config.bits, config.group_size, linear.in_features, linear.out_features)
    return WQLinear_GEMM(*sizes, linear.bias is not None, "meta").eval()


def kernel(device: str) -> str:
    """What multiplies on `device`."""
    return "autoawq WQLinear_GEMM" + (", dequantized to float16 in each pass" if device == "cpu" else "")


def pack(module: Any) -> PackedWeight:
    return pack_awq(module.qweight, module.qzeros, module.scales, module.group_size, sym=False)


def _quantized(name: str, module: Any) -> Quantized | None:
    if not isinstance(module, WQLinear_GEMM):
        return None
    shape = (module.out_features, module.in_features)
    return Quantized(shape, module.w_bit, f"awq{module.w_bit}", kernel(module.qweight.device.type))
