"""How gptqmodel's AWQ modules store their weights, how they are made, and how gradients pass them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from polyquant.errors import ConfigError
from polyquant.plugin import LayerInfo, LoadedModel, layers
from polyquant.plugin.layers import Quantized, describe, differentiable

from polyquant_awq._library import (
    AwqTorchLinear,
    BaseQuantLinear,
    TorchAtenAwqLinear,
    contained,
    hf_select_quant_linear_v2,
)
from polyquant_awq.options import VERSION, AwqOptions
from polyquant_awq.planning import ATEN_ROWS, SCHEME, why_not

CPU_KERNELS = (TorchAtenAwqLinear, AwqTorchLinear)
SPENT = ("qzeros", "scales")
"""What the int4 matmul no longer needs once its own form of the weights is made."""


def describe_layers(model: Any) -> list[LayerInfo]:
    return describe(model, _quantized, skipped=model.config.quantization_config["skip_modules"])


def select_kernel(config: AwqOptions, device: str) -> type[BaseQuantLinear]:
    """The class of the packed layers. Raises ConfigError where the kernel asked for does not take them."""
    if device == "cpu":
        if why := why_not(config):
            raise ConfigError(f"kernel {config.kernel!r} cannot be used on cpu: {why}")
        return TorchAtenAwqLinear if config.kernel == "torch_aten" else AwqTorchLinear
    name = "auto" if config.kernel == "auto" else f"awq_{config.kernel}"
    try:
        with contained():
            chosen: type[BaseQuantLinear] = hf_select_quant_linear_v2(
                bits=config.bits, group_size=config.group_size, desc_act=False, sym=not config.zero_point,
                zero_point=config.zero_point, format=VERSION, quant_method="awq", device_map={"": device},
                backend=name, pack=False, dtype=config.compute_dtype,
            )  # fmt: skip
    except (NotImplementedError, ImportError, ValueError) as error:
        raise ConfigError(f"kernel {config.kernel!r} cannot be used on {device} here: {error}") from error
    return chosen


def empty_layer(linear: Any, kernel: type[BaseQuantLinear], config: AwqOptions, name: str) -> BaseQuantLinear:
    """A packed layer on the meta device that takes the place of `linear`. Raises ConfigError for an unfit size."""
    if kernel is TorchAtenAwqLinear and linear.out_features % ATEN_ROWS:
        kernel = AwqTorchLinear
    # a kernel for GPUs is made for one dtype; those for CPUs take any, and say float32 is none of theirs
    dtype = {} if kernel in CPU_KERNELS else {"dtype": getattr(torch, config.compute_dtype)}
    try:
        with torch.device("meta"):
            layer = kernel(
                bits=config.bits, group_size=config.group_size, sym=not config.zero_point, desc_act=False,
                in_features=linear.in_features, out_features=linear.out_features, bias=linear.bias is not None,
                pack_dtype=torch.int32, register_buffers=True, name=name, **dtype,
            )  # fmt: skip
    except NotImplementedError as error:
        raise ConfigError(f"{kernel.__name__} does not take {name}: {error}; choose kernel='torch'") from error
    layer.optimized = True  # no torch.compile
    return layer.eval()


def settle(layer: BaseQuantLinear, dtype: torch.dtype) -> None:
    """Bring a layer with its weights, on the CPU, into the form that it keeps: nothing is made later."""
    if isinstance(layer, TorchAtenAwqLinear):
        layer.transform("cpu", dtype)
        layer.linear_mode = "inference"
        for name in SPENT:
            setattr(layer, name, None)
    if layer.bias is not None:
        layer.register_parameter("bias", torch.nn.Parameter(layer._buffers.pop("bias"), requires_grad=False))


def prepare_for_training(loaded: LoadedModel) -> Any:
    """Freeze, recompute activations in the backward pass, and let gradients pass torch's int4 matmul."""
    for module in loaded.model.modules():
        if isinstance(module, TorchAtenAwqLinear):
            module._fused_op_forward = partial(differentiable, module._fused_op_forward)
    return layers.frozen_for_adapters(loaded.model)


def _quantized(name: str, module: Any) -> Quantized | None:
    if not isinstance(module, BaseQuantLinear):
        return None
    shape = (module.out_features, module.in_features)
    return Quantized(shape, module.bits, SCHEME, f"gptqmodel {type(module).__name__}")
