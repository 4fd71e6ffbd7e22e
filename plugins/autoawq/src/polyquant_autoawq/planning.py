"""Bytes of AutoAWQ's layers from shapes alone, and which layers it can pack."""

from __future__ import annotations

from collections.abc import Sequence

from polyquant.errors import ConfigError
from polyquant.plugin import LayerPlan, WeightInfo, layouts, plan_linears

from polyquant_autoawq.options import AutoawqOptions

SCHEME = "awq4"
WORD = 8  # weights of one int32 word


def plan_layers(weights: Sequence[WeightInfo], config: AutoawqOptions) -> list[LayerPlan]:
    """Raises ConfigError for a layer that cannot be packed."""
    return plan_linears(weights, config, SCHEME, lambda weight: quantized_bytes(weight, config))


def quantized_bytes(weight: WeightInfo, config: AutoawqOptions) -> int:
    """Packed weight with float16 scales and zero points, as the checkpoint has them."""
    out_features, in_features = weight.shape
    what = ""
    if config.group_size != -1 and in_features % config.group_size:
        what = f"group_size {config.group_size} does not divide in_features {in_features}"
    elif out_features % WORD:
        what = f"words hold {WORD} weights, which does not divide out_features {out_features}"
    if what:
        short = weight.name.rpartition(".")[0].rpartition(".")[2]
        raise ConfigError(f"{what} of {weight.name}; use another group_size, or skip=({short!r},)")
    return layouts.awq_bytes(weight.shape, config.bits, config.group_size)
