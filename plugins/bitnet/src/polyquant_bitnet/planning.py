"""Bytes of ternary layers from shapes alone, and which layers are ternary. Format: transformers.integrations.bitnet."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import msgspec
from polyquant.errors import ConfigError
from polyquant.plugin import DTYPE_BYTES, LayerPlan, WeightInfo, module_of, plan_linears

from polyquant_bitnet.options import BitnetOptions

SCHEME = "ternary-a8"
PACKED = 4  # rows of a weight in one row of bytes


def plan_layers(weights: Sequence[WeightInfo], config: BitnetOptions) -> list[LayerPlan]:
    """Raises ConfigError where the rows of a layer cannot be packed by four, or experts are fused into one tensor."""
    config = with_full_names(weights, config)
    for weight in weights:
        if weight.role == "experts" and not config.skips(weight):
            raise ConfigError(
                f"{weight.name} holds the experts of a layer in one tensor {weight.shape}: "
                "BitNet checkpoints of such models are not read"
            )
    return plan_linears(weights, config, SCHEME, lambda weight: quantized_bytes(weight, config))


def quantized_bytes(weight: WeightInfo, config: BitnetOptions) -> int:
    """Two bits a weight, a scale, and the weights of the layer's own norm, both in the compute dtype."""
    if weight.shape[0] % PACKED:
        raise ConfigError(
            f"{module_of(weight)} has {weight.shape[0]} output rows, which cannot be packed four in a byte; "
            "keep it dense"
        )
    extra = 1 + (weight.shape[1] if config.use_rms_norm else 0)
    return prod(weight.shape) // PACKED + extra * DTYPE_BYTES[weight.dtype]


def with_full_names(weights: Sequence[WeightInfo], config: BitnetOptions) -> BitnetOptions:
    """`config` with the full names of the modules that `skip` keeps dense; it may hold the start or the end of them."""
    modules = dict.fromkeys(module_of(weight) for weight in weights)
    names = [
        module
        for module in modules
        if any(module == part or module.startswith(f"{part}.") or module.endswith(f".{part}") for part in config.skip)
    ]
    return msgspec.structs.replace(config, skip=tuple(names))
