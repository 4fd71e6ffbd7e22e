"""How AutoRound's modules store their weights after loading."""

from __future__ import annotations

from typing import Any

from polyquant.memory.describe import Quantized, describe
from polyquant.types import LayerInfo

from polyquant_auto_round._kernels import FAST, SLOW, is_fast


def describe_layers(model: Any) -> list[LayerInfo]:
    return describe(model, _quantized, skipped=model.config.quantization_config["skip_modules"])


def kernel(bits: int) -> str:
    """What multiplies with weights of so many bits here."""
    return FAST if is_fast(bits) else SLOW


def _quantized(name: str, module: Any) -> Quantized | None:
    scheme = getattr(module, "polyquant_scheme", "")
    if not scheme:
        return None
    return Quantized((module.outfeatures, module.infeatures), module.bits, scheme, kernel(module.bits))
