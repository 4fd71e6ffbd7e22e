"""Bytes of auto-gptq's layers from shapes alone, and which layers it can hold."""

from __future__ import annotations

from collections.abc import Sequence

from polyquant.plugin import DTYPE_BYTES, LayerPlan, WeightInfo, layouts, plan_linears, unfit

from polyquant_autogptq.options import AutogptqOptions

WORDS = 32  # it wants in_features and out_features in multiples of it
SHIFTS_3 = 36  # int32 words of the table that unpacks 3-bit weights


def plan_layers(weights: Sequence[WeightInfo], config: AutogptqOptions) -> list[LayerPlan]:
    """Raises ConfigError for a layer that the library cannot hold."""
    return plan_linears(
        weights, config, config.scheme, lambda weight: quantized_bytes(weight, config),
        packed=lambda weight: layouts.packed_format(
            weight, config.bits, config.group_size, sym=config.sym, ordered=config.desc_act
        ),
    )  # fmt: skip


def quantized_bytes(weight: WeightInfo, config: AutogptqOptions) -> int:
    """Packed weight with zero points, scales in the compute dtype, each column's group, and the table of shifts."""
    out_features, in_features = weight.shape
    layouts.require_groups(weight, config.group_size)
    if in_features % WORDS or out_features % WORDS:
        raise unfit(weight, f"auto-gptq takes multiples of {WORDS} as sizes, not {out_features} x {in_features}")
    stored = layouts.gptq_bytes(weight.shape, config.bits, config.group_size, scale_bytes=DTYPE_BYTES[weight.dtype])
    return stored + 4 * (SHIFTS_3 if config.bits == 3 else 32 // config.bits)
