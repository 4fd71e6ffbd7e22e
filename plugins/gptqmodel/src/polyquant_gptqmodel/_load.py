"""Reads GPTQ and AWQ checkpoints into gptqmodel's layers: every tensor is checked by name and shape on the way."""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from polyquant.plugin import (
    LoadedModel,
    LoadRequest,
    checkpoints,
    quantized_modules,
    repacked_modules,
    resolved_dtype,
)
from polyquant.plugin.formats import GEMM, awq_version
from polyquant.plugin.layers import bias_as_parameter, fill_empty, gptq_tensors, layer_tensors, parts_of

from polyquant_gptqmodel._layers import Layer, empty_layer, kernel_name, select_kernel, settle
from polyquant_gptqmodel._library import contained, hf_convert_gptq_v1_to_v2_format, hf_gptqmodel_post_init
from polyquant_gptqmodel._read import ordinary
from polyquant_gptqmodel.options import GEMV, GEMV_FAST, MARLIN, GptqOptions, Options, stored_layout
from polyquant_gptqmodel.planning import OWN_CHOICE, cpu_kernel, plan_layers

PARTS = ("qweight", "qzeros", "scales", "g_idx", "B")

MADE = {MARLIN: "gptq_v2", GEMV: GEMM, GEMV_FAST: GEMM}
"""Layout of another kernel -> the one that it is brought into."""


def load(request: LoadRequest, config: Options) -> LoadedModel:
    source, wanted = request.source, resolved_dtype(config)
    dtype, on_cpu = getattr(torch, wanted), request.device == "cpu"
    config, notes = checkpoints.as_packed(config, request, PARTS)
    if on_cpu and config.kernel in OWN_CHOICE:
        config = msgspec.structs.replace(config, kernel=cpu_kernel(config, wanted))
    plans = plan_layers(request.weights, config)
    names = sorted(quantized_modules(plans))
    repacked = repacked_modules(plans, config)
    is_gptq = isinstance(config, GptqOptions)
    stored = source.stored_quantization
    found = stored_layout(stored) if is_gptq else awq_version(stored)
    layout = MADE.get(found, found)
    kernel = select_kernel(config, layout, request.device)
    if layout != found:
        notes.append(f"stored for the kernel {found}: weights are put into the order of {layout} while reading")

    def read(name: str, linear: Any, tensors: dict[str, torch.Tensor]) -> Layer:
        layer = empty_layer(linear, kernel, config, name)
        tensors = ordinary(found, linear, tensors, config.group_size)
        if is_gptq:
            tensors = gptq_tensors(linear, tensors, config.group_size, in_order=not config.desc_act)
        keeps_scales = is_gptq and on_cpu and dtype != torch.float32
        whole = layer_tensors(linear, tensors, parts_of(layer))
        kept = {part: _kept(part, tensor, dtype, keeps_scales) for part, tensor in whole.items()}
        fill_empty(layer, kept | {"scales": whole["scales"]} if name in repacked else kept)
        with contained():
            hf_convert_gptq_v1_to_v2_format(layer, config.bits, kernel, layout, None)
            if name in repacked:
                bias_as_parameter(layer)
            elif on_cpu:
                layer.post_init()  # gptqmodel's function for it collects garbage after each call, 0.3 s a layer
                settle(layer, dtype)
        return layer

    model = checkpoints.read_layers(request, wanted, names, read)
    if not on_cpu:
        with contained():
            hf_gptqmodel_post_init(model, use_act_order=config.desc_act)
    kernels = {kernel_name(model.get_submodule(name)) for name in names}
    return LoadedModel(model=model, config=config, kernel=", ".join(sorted(kernels)), notes=notes)


def _kept(part: str, tensor: torch.Tensor, dtype: torch.dtype, keeps_scales: bool) -> torch.Tensor:
    """A tensor of a layer in the dtype in which it is kept. keeps_scales: those of 16 bits as they are stored."""
    if part == "qzeros":
        return tensor.clone()  # zero points are changed in place
    if part in ("qweight", "g_idx"):
        return tensor
    return tensor if part == "scales" and keeps_scales and tensor.element_size() == 2 else tensor.to(dtype)
