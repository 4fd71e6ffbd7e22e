"""How gptqmodel's modules store their weights, how they are made, and how gradients pass them."""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
from polyquant.errors import ConfigError
from polyquant.plugin import LayerInfo, LoadedModel, layers
from polyquant.plugin.layers import Quantized, describe, differentiable

from polyquant_gptq._library import (
    BaseQuantLinear,
    PackableQuantLinear,
    TorchAtenLinear,
    TorchLinear,
    contained,
    hf_select_quant_linear_v2,
)
from polyquant_gptq.options import GptqOptions
from polyquant_gptq.planning import ATEN_ROWS, why_not_aten

CPU_KERNELS = (TorchAtenLinear, TorchLinear)
SPENT = ("qzeros", "scales", "g_idx", "wf_unsqueeze_zero", "wf_unsqueeze_neg_one")
"""What the int4 matmul no longer needs once its own form of the weights is made."""


def describe_layers(model: Any) -> list[LayerInfo]:
    return describe(model, _quantized, skipped=model.config.quantization_config["skip_modules"])


def select_kernel(config: GptqOptions, layout: str, device: str) -> type[BaseQuantLinear]:
    """The class of the packed layers. Raises ConfigError where the kernel asked for does not take them."""
    if device == "cpu" and config.kernel in ("torch_aten", "torch"):
        why = why_not_aten(config, config.compute_dtype) if config.kernel == "torch_aten" else ""
        if why:
            raise ConfigError(f"kernel 'torch_aten' cannot be used: {why}; leave kernel at 'auto'")
        return TorchAtenLinear if config.kernel == "torch_aten" else TorchLinear
    name = "auto" if config.kernel == "auto" else f"gptq_{config.kernel}"
    try:
        with contained():
            chosen: type[BaseQuantLinear] = hf_select_quant_linear_v2(
                bits=config.bits, group_size=config.group_size, desc_act=config.desc_act, sym=config.sym,
                format=layout, quant_method="gptq", device_map={"": device}, backend=name, pack=False,
                dtype=config.compute_dtype,
            )  # fmt: skip
    except (NotImplementedError, ImportError, ValueError) as error:
        raise ConfigError(f"kernel {config.kernel!r} cannot be used on {device} here: {error}") from error
    return chosen


def empty_layer(linear: Any, kernel: type[BaseQuantLinear], config: GptqOptions, name: str) -> BaseQuantLinear:
    """A packed layer on the meta device that takes the place of `linear`. Raises ConfigError for an unfit size."""
    if kernel is TorchAtenLinear and linear.out_features % ATEN_ROWS:
        kernel = TorchLinear
    # a kernel for GPUs is made for one dtype; those for CPUs take any, and say float32 is none of theirs
    dtype = {} if kernel in CPU_KERNELS else {"dtype": getattr(torch, config.compute_dtype)}
    try:
        with torch.device("meta"):
            layer = kernel(
                bits=config.bits, group_size=config.group_size, sym=config.sym, desc_act=config.desc_act,
                in_features=linear.in_features, out_features=linear.out_features, bias=linear.bias is not None,
                pack_dtype=torch.int32, register_buffers=True, name=name, **dtype,
            )  # fmt: skip
    except NotImplementedError as error:
        raise ConfigError(f"{kernel.__name__} does not take {name}: {error}; choose kernel='torch'") from error
    layer.optimized = True  # no torch.compile: it starts a C++ compiler in the first forward pass
    return layer.eval()


def settle(layer: BaseQuantLinear, dtype: torch.dtype) -> None:
    """Bring a layer with its weights, on the CPU, into the form that it keeps: nothing is made or cached later."""
    if isinstance(layer, TorchAtenLinear):
        layer.transform("cpu", dtype)
        layer.linear_mode = "inference"
        for name in SPENT + (("ret_idx",) if layer._ret_idx_is_identity() else ()):
            setattr(layer, name, None)
    elif isinstance(layer, TorchLinear):
        # its own method caches zero points and group indices where no walk finds them
        layer.dequantize_weight = MethodType(PackableQuantLinear.dequantize_weight, layer)
    if layer.bias is not None:
        layer.register_parameter("bias", torch.nn.Parameter(layer._buffers.pop("bias"), requires_grad=False))


def prepare_for_training(loaded: LoadedModel) -> Any:
    """Freeze, recompute activations in the backward pass, and let gradients pass torch's int4 matmul."""
    for module in loaded.model.modules():
        if isinstance(module, TorchAtenLinear):
            module._fused_op_forward = partial(differentiable, module._fused_op_forward)
    return layers.frozen_for_adapters(loaded.model)


def _quantized(name: str, module: Any) -> Quantized | None:
    if not isinstance(module, BaseQuantLinear):
        return None
    shape = (module.out_features, module.in_features)
    return Quantized(shape, module.bits, f"gptq{module.bits}", f"gptqmodel {type(module).__name__}")
