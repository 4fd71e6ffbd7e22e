"""How bitsandbytes' modules store their weights, and what they need for training."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import nn as bnb
from bitsandbytes.functional import dequantize_blockwise
from polyquant.plugin import LayerInfo, LoadedModel, group_of_runs
from polyquant.plugin.layers import PackedWeight, Quantized, describe, pack_weight

from polyquant_bitsandbytes._library import kernel
from polyquant_bitsandbytes.options import BitsAndBytesOptions

LARGEST = 127  # of the 8-bit codes, to which a row's scale belongs


def describe_layers(model: Any) -> list[LayerInfo]:
    config = getattr(model.config, "quantization_config", None)
    skipped = getattr(config, "llm_int8_skip_modules", None) or ()
    return describe(model, _quantized, skipped=skipped)


def prepare_for_training(loaded: LoadedModel) -> Any:
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(loaded.model, gradient_checkpointing_kwargs={"use_reentrant": False})


def pack(module: Any) -> PackedWeight:
    if isinstance(module, bnb.Linear8bitLt):
        scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        return pack_weight(module.weight.detach(), scales.float()[:, None] / LARGEST)
    state = module.weight.quant_state
    rows, columns = state.shape
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    codes = module.weight.detach().reshape(-1).view(torch.uint8)
    codes = torch.stack([codes >> 4, codes & 15], 1).view(-1)[: rows * columns].view(rows, columns)
    group = group_of_runs(state.blocksize, columns)
    scales = absmax.float().repeat_interleave(state.blocksize // group)[: rows * columns // group]
    return pack_weight(codes, scales.view(rows, -1), group, table=state.code)


def quantize_linear(linear: torch.nn.Linear, config: BitsAndBytesOptions) -> Any:
    """As transformers does it: the weight is quantized where it is moved to its device."""
    dense, device = linear.weight.detach(), linear.weight.device
    size = (linear.in_features, linear.out_features)
    if config.bits == 8:
        layer = bnb.Linear8bitLt(*size, bias=False, has_fp16_weights=False, device="meta")
        layer.weight = bnb.Int8Params(dense, requires_grad=False, has_fp16_weights=False).to(device)
        return layer
    layer = bnb.Linear4bit(*size, bias=False, device="meta")
    layer.weight = bnb.Params4bit(
        dense, requires_grad=False, quant_type=config.quant_type, compress_statistics=bool(config.double_quant),
        quant_storage=getattr(torch, config.quant_storage or "uint8"),
    ).to(device)  # fmt: skip
    return layer


def _quantized(name: str, module: Any) -> Quantized | None:
    """A module whose weight is packed; one that offloading or tying has left dense is not."""
    shape = (getattr(module, "out_features", 0), getattr(module, "in_features", 0))
    if isinstance(module, bnb.Linear4bit) and getattr(module.weight, "quant_state", None) is not None:
        return Quantized(shape, 4, module.weight.quant_state.quant_type, kernel(module.weight.device.type))
    if isinstance(module, bnb.Linear8bitLt) and module.weight.dtype.itemsize == 1:
        return Quantized(shape, 8, "int8", kernel(module.weight.device.type))
    return None
