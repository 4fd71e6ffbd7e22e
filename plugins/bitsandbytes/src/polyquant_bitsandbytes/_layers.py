"""How bitsandbytes' modules store their weights, and what they need for training."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import nn as bnb
from bitsandbytes.functional import QuantState, dequantize_blockwise, get_4bit_type
from polyquant.errors import Misfit
from polyquant.plugin import LayerInfo, LoadedModel, group_of_runs
from polyquant.plugin.layers import PackedWeight, Quantized, WeightCodes, describe, pack_weight

from polyquant_bitsandbytes._library import kernel
from polyquant_bitsandbytes._quantize import quantize_4bit
from polyquant_bitsandbytes.options import BLOCK, BitsAndBytesOptions

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


def unpack(weight: WeightCodes, config: BitsAndBytesOptions) -> dict[str, torch.Tensor]:
    """4 bit: block scales in float32, not quantized again. 8 bit: the largest weight of each row."""
    if config.bits == 8:
        held = weight.integers(8).without_zero_points().in_order().in_groups(-1)
        return {"weight": held.codes, "SCB": _times_largest(held.scales.float().flatten()),
                "weight_format": torch.tensor(0, dtype=torch.uint8)}  # fmt: skip
    if config.double_quant:
        raise Misfit("double quantization", "its block scales would be rounded, and are held as they are alone")
    held, table = weight.in_order().in_groups(BLOCK), get_4bit_type(config.quant_type, device="cpu")
    if held.table is None or not torch.equal(held.table, table):
        raise Misfit("bits", f"its codes are {held.kind} of {held.bits} bits, and {config.quant_type} is held")
    pairs = held.codes.flatten()
    state = QuantState(
        absmax=held.scales.float().flatten(), shape=torch.Size(held.shape), code=table, blocksize=BLOCK,
        quant_type=config.quant_type, dtype=torch.float32,
    )  # fmt: skip
    constants = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return {"weight": (pairs[::2] << 4 | pairs[1::2])[:, None], **constants}


def _times_largest(scales: torch.Tensor) -> torch.Tensor:
    """float32 that are `scales` when divided by LARGEST, where there are such."""
    products = scales * LARGEST
    for near in (torch.nextafter(products, products * 2), torch.nextafter(products, products / 2)):
        products = torch.where(products / LARGEST == scales, products, near)
    return products


def quantize_linear(linear: torch.nn.Linear, config: BitsAndBytesOptions) -> Any:
    """As transformers does it: the weight is quantized where it is moved to its device."""
    dense, device = linear.weight.detach(), linear.weight.device
    size = (linear.in_features, linear.out_features)
    if config.bits == 8:
        layer = bnb.Linear8bitLt(*size, bias=False, has_fp16_weights=False, device="meta")
        layer.weight = bnb.Int8Params(dense, requires_grad=False, has_fp16_weights=False).to(device)
        return layer
    layer = bnb.Linear4bit(*size, bias=False, device="meta")
    layer.weight = quantize_4bit(
        dense, quant_type=config.quant_type, compress_statistics=bool(config.double_quant),
        quant_storage=getattr(torch, config.quant_storage or "uint8"),
    )  # fmt: skip
    return layer


def _quantized(name: str, module: Any) -> Quantized | None:
    """A module whose weight is packed; one that offloading or tying has left dense is not."""
    shape = (getattr(module, "out_features", 0), getattr(module, "in_features", 0))
    if isinstance(module, bnb.Linear4bit) and getattr(module.weight, "quant_state", None) is not None:
        return Quantized(shape, 4, module.weight.quant_state.quant_type, kernel(module.weight.device.type))
    if isinstance(module, bnb.Linear8bitLt) and module.weight.dtype.itemsize == 1:
        return Quantized(shape, 8, "int8", kernel(module.weight.device.type))
    return None
