"""Weights in 4 bits by bitsandbytes' quantizer, some blocks at a time: it holds 24 bytes of each weight."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Params4bit
from polyquant.plugin.layers import in_bands
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from polyquant_bitsandbytes.options import BLOCK

BLOCKS_OF_BLOCK_SCALES = 256  # that share a scale of their own, with double quantization


def quantized_4bit(module: Any, weight: Tensor) -> Params4bit:
    """A dense weight in the place of a Linear4bit's own, as moving that to its device makes it.

    module: whose weight has the options; a Conv1D has in_features first. weight: where it is to be.
    """
    return quantize_4bit(weight.T if issubclass(module.source_cls, Conv1D) else weight, **module.weight.__dict__)


def quantize_4bit(weight: Tensor, *, module: Any = None, **options: Any) -> Params4bit:
    """weight: (rows, columns). module: who has it. options: those of Params4bit."""
    packed = Params4bit(torch.empty(0, device=weight.device), requires_grad=False, module=module, **options)
    of_type = {"blocksize": packed.blocksize, "quant_type": packed.quant_type}

    def rounded(blocks: Tensor) -> dict[str, Tensor]:
        codes, state = functional.quantize_4bit(blocks, **of_type, compress_statistics=False, quant_storage=torch.uint8)
        return {"codes": codes, "absmax": state.absmax}

    length = BLOCK if weight.numel() % BLOCK == 0 else weight.numel()
    made = in_bands(weight.detach().reshape(-1, length), rounded)
    absmax, nested = made["absmax"], dict[str, Any]()
    if packed.compress_statistics:
        offset = absmax.mean()
        absmax, state2 = functional.quantize_blockwise(absmax - offset, blocksize=BLOCKS_OF_BLOCK_SCALES)
        nested = {"offset": offset, "state2": state2}
    packed.quant_state = functional.QuantState(
        absmax=absmax, shape=weight.shape, dtype=weight.dtype, **of_type, **nested,
        code=functional.get_4bit_type(packed.quant_type, device=weight.device),
    )  # fmt: skip
    packed.data = made["codes"].view(-1).view(packed.quant_storage)[:, None]
    packed.bnb_quantized = True
    if module is not None:
        module.quant_state = packed.quant_state
    return packed
