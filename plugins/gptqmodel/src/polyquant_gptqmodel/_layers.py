"""How gptqmodel's modules store their weights, how they are made, and how gradients pass them."""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
from polyquant.errors import ConfigError
from polyquant.plugin import LayerInfo, LoadedModel, is_packed
from polyquant.plugin.layers import (
    PackedWeight,
    Quantized,
    WeightCodes,
    bias_as_parameter,
    describe,
    differentiable,
    frozen_for_adapters,
)
from polyquant.plugin.packing import pack_awq, pack_gptq, unpack_awq, unpack_gptq

from polyquant_gptqmodel._library import (
    AwqTorchLinear,
    AWQuantLinear,
    BaseQuantLinear,
    PackableQuantLinear,
    TorchAtenAwqLinear,
    TorchAtenLinear,
    TorchLinear,
    contained,
    hf_select_quant_linear_v2,
)
from polyquant_gptqmodel.options import AwqOptions, Options
from polyquant_gptqmodel.planning import ATEN_ROWS, AWQ_TORCH_GROUPS, OWN_CHOICE, why_not_on_cpu

Layer = BaseQuantLinear
ATEN: dict[str, type[Layer]] = {"gptq": TorchAtenLinear, "awq": TorchAtenAwqLinear}
"""method -> the layer that multiplies with torch's int4 matmul for CPUs."""
UNPACKING: dict[str, type[Layer]] = {"gptq": TorchLinear, "awq": AwqTorchLinear}
"""method -> the layer that unpacks its weights in each forward pass."""
SPENT = ("qzeros", "scales", "g_idx", "wf_unsqueeze_zero", "wf_unsqueeze_neg_one")
"""What the int4 matmul no longer needs once its own form of the weights is made."""


def describe_layers(model: Any) -> list[LayerInfo]:
    return describe(model, _quantized, skipped=model.config.quantization_config["skip_modules"])


def select_kernel(config: Options, layout: str, device: str) -> type[Layer]:
    """The class of the packed layers. Raises ConfigError where the kernel asked for does not take them."""
    if is_packed(config):  # it only holds them; those that have no place in polyquant's layout are unpacked
        held_by_aten = config.method == "awq" and config.group_size not in AWQ_TORCH_GROUPS
        return (ATEN if held_by_aten else UNPACKING)[config.method]
    if device == "cpu":
        if why := why_not_on_cpu(config.kernel, config, config.compute_dtype):
            raise ConfigError(f"kernel {config.kernel!r} cannot be used on cpu: {why}; leave kernel at 'auto'")
        return (ATEN if config.kernel == "torch_aten" else UNPACKING)[config.method]
    name = "auto" if config.kernel in OWN_CHOICE else f"{config.method}_{config.kernel}"
    try:
        with contained():
            chosen: type[Layer] = hf_select_quant_linear_v2(
                bits=config.bits, group_size=config.group_size, desc_act=config.desc_act, sym=config.sym,
                format=layout, quant_method=config.method, device_map={"": device}, backend=name, pack=False,
                dtype=config.compute_dtype,
            )  # fmt: skip
    except (NotImplementedError, ImportError, ValueError) as error:
        raise ConfigError(f"kernel {config.kernel!r} cannot be used on {device} here: {error}") from error
    return chosen


def empty_layer(linear: Any, kernel: type[Layer], config: Options, name: str) -> Layer:
    """A packed layer on the meta device that takes the place of `linear`. Raises ConfigError for an unfit size."""
    if kernel is ATEN[config.method] and linear.out_features % ATEN_ROWS and not is_packed(config):
        kernel = UNPACKING[config.method]
    # a kernel for GPUs is made for one dtype; those for CPUs take any, and say float32 is none of theirs
    for_cpu = kernel in (ATEN[config.method], UNPACKING[config.method])
    dtype = {} if for_cpu else {"dtype": getattr(torch, config.compute_dtype)}
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


def settle(layer: Layer, dtype: torch.dtype) -> None:
    """Bring a layer with its weights, on the CPU, into the form that it keeps: nothing is made or cached later."""
    if isinstance(layer, tuple(ATEN.values())):
        layer.transform("cpu", dtype)
        layer.linear_mode = "inference"
        in_order = isinstance(layer, TorchAtenLinear) and layer._ret_idx_is_identity()
        for name in (*SPENT, *(("ret_idx",) if in_order else ())):
            if hasattr(layer, name):
                setattr(layer, name, None)
    elif isinstance(layer, TorchLinear):
        # its own method caches zero points and group indices where no walk finds them
        layer.dequantize_weight = MethodType(PackableQuantLinear.dequantize_weight, layer)
    bias_as_parameter(layer)


def kernel_name(layer: Layer) -> str:
    return f"gptqmodel {type(layer).__name__}"


def prepare_for_training(loaded: LoadedModel) -> Any:
    """Freeze, recompute activations in the backward pass, and let gradients pass torch's int4 matmul."""
    for module in loaded.model.modules():
        if isinstance(module, tuple(ATEN.values())):
            module._fused_op_forward = partial(differentiable, module._fused_op_forward)
    return frozen_for_adapters(loaded.model)


def pack(module: Any) -> PackedWeight:
    """As a layer holds its weight before `settle`: zero points of GPTQ layers are not stored less one there."""
    parts = (module.qweight, module.qzeros, module.scales)
    if isinstance(module, AWQuantLinear):
        return pack_awq(*parts, module.group_size, sym=module.sym)
    return pack_gptq(*parts, module.g_idx, module.bits, module.group_size, sym=module.sym, ordered=module.desc_act)


def unpack(weight: WeightCodes, config: Options) -> dict[str, torch.Tensor]:
    if isinstance(config, AwqOptions):
        return unpack_awq(weight, config.group_size, sym=config.sym)
    return unpack_gptq(
        weight, config.bits, config.group_size, sym=config.sym, ordered=config.desc_act,
        less_one=config.written_layout == "gptq",
    )  # fmt: skip


def _quantized(name: str, module: Any) -> Quantized | None:
    if not isinstance(module, Layer):
        return None
    method = "awq" if isinstance(module, AWQuantLinear) else "gptq"
    shape = (module.out_features, module.in_features)
    return Quantized(shape, module.bits, f"{method}{module.bits}", kernel_name(module))
