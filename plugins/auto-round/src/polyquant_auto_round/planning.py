"""Bytes of AutoRound's layers from shapes alone, and which layers it can take."""

from __future__ import annotations

from collections.abc import Sequence

from polyquant.errors import ConfigError
from polyquant.plugin import DTYPE_BYTES, LayerPlan, WeightInfo, layouts, plan_linears, unfit

from polyquant_auto_round.options import AutoRoundOptions

WORD = 32  # weights that come out even in words of any number of bits; auto-round leaves other layers dense


def plan_layers(weights: Sequence[WeightInfo], config: AutoRoundOptions) -> list[LayerPlan]:
    """For the CPU. Raises ConfigError for a layer that cannot be packed, and for fused experts."""
    for weight in weights:
        if weight.role == "experts" or (weight.role == "linear" and "Linear" not in weight.module):
            raise ConfigError(
                f"{weight.name} is no Linear module but {weight.module} with shape {weight.shape}; this backend "
                "quantizes Linear modules only"
            )
    return plan_linears(
        weights, config, config.scheme, lambda weight: quantized_bytes(weight, config),
        packed=lambda weight: layouts.packed_format(weight, config.bits, config.group_size, sym=config.sym),
    )  # fmt: skip


def quantized_bytes(weight: WeightInfo, config: AutoRoundOptions) -> int:
    """Bytes of a layer after loading: what auto-round-lib repacks it to, or the checkpoint's own layout."""
    from polyquant_auto_round import _kernels

    require_packable(weight, config)
    if _kernels.is_fast(config.bits):
        return _kernels.packed_bytes(weight.shape, config)
    stored = layouts.gptq_tensors(weight.shape, config.bits, config.group_size, scale_bytes=DTYPE_BYTES[weight.dtype])
    return layouts.total_bytes({name: tensor for name, tensor in stored.items() if name != "g_idx"})


def require_packable(weight: WeightInfo, config: AutoRoundOptions) -> None:
    """Raises ConfigError where the groups or the packed words of a layer do not come out even."""
    out_features, in_features = weight.shape
    what = ""
    if in_features % WORD or out_features % WORD:
        what = f"auto-round packs {WORD} weights together, which does not divide {out_features} x {in_features}"
    elif config.group_size != -1 and in_features % config.group_size:
        what = f"group_size {config.group_size} does not divide in_features {in_features}"
    if what:
        raise unfit(weight, what, ("another group_size",))
