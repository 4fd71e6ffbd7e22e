"""Bytes of AutoAWQ's layers from shapes alone, and which layers it can pack."""

from __future__ import annotations

from collections.abc import Sequence

from polyquant.plugin import LayerPlan, WeightInfo, layouts, plan_linears

from polyquant_autoawq.options import AutoawqOptions


def plan_layers(weights: Sequence[WeightInfo], config: AutoawqOptions) -> list[LayerPlan]:
    """Raises ConfigError for a layer that cannot be packed."""
    return plan_linears(
        weights, config, config.scheme, lambda weight: quantized_bytes(weight, config),
        packed=lambda weight: layouts.packed_format(weight, config.bits, config.group_size, sym=False),
    )  # fmt: skip


def quantized_bytes(weight: WeightInfo, config: AutoawqOptions) -> int:
    """Packed weight with float16 scales and zero points, as the checkpoint has them."""
    layouts.require_awq(weight, config.bits, config.group_size)
    return layouts.awq_bytes(weight.shape, config.bits, config.group_size)
