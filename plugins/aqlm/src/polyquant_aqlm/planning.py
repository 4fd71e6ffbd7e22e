"""Bytes of AQLM's layers from shapes alone, and which layers it can take. Format: aqlm.inference.QuantizedLinear."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from polyquant.errors import ConfigError
from polyquant.plugin import DTYPE_BYTES, LayerPlan, WeightInfo, is_skipped, plan_linears

from polyquant_aqlm.options import AqlmOptions

SCHEME = "aqlm"


def plan_layers(weights: Sequence[WeightInfo], config: AqlmOptions) -> list[LayerPlan]:
    """Raises ConfigError where groups do not fit a layer, or experts are fused into one tensor."""
    for weight in weights:
        if weight.role == "experts" and not is_skipped(weight, config):
            raise ConfigError(
                f"{weight.name} holds the experts of a layer in one tensor {weight.shape}: "
                "AQLM checkpoints of such models are not read"
            )
    return plan_linears(weights, config, SCHEME, lambda weight: quantized_bytes(weight, config))


def quantized_bytes(weight: WeightInfo, config: AqlmOptions) -> int:
    """Codes, and codebooks and scales in the compute dtype."""
    shapes = packed_shapes(weight.name.rpartition(".")[0], weight.shape, config)
    dtype_bytes = DTYPE_BYTES[weight.dtype]
    code_bytes = 1 if config.nbits_per_codebook <= 8 else 2
    sizes = {"codes": code_bytes, "codebooks": dtype_bytes, "scales": dtype_bytes}
    return sum(prod(shape) * sizes[name] for name, shape in shapes.items())


def packed_shapes(name: str, shape: tuple[int, ...], config: AqlmOptions) -> dict[str, tuple[int, ...]]:
    """Shapes of the layer's codes, codebooks and scales. Raises ConfigError where the groups do not come out even.

    shape: (out_features, in_features).
    """
    groups = []
    for dimension, length, size in zip(
        ("out_features", "in_features"), shape, (config.out_group_size, config.in_group_size), strict=True
    ):
        if length % size:
            raise ConfigError(f"{name} has {dimension} {length}, which groups of {size} do not divide; keep it dense")
        groups.append(length // size)
    vector = (config.out_group_size, config.in_group_size)
    return {
        "codes": (*groups, config.num_codebooks),
        "codebooks": (config.num_codebooks, 2**config.nbits_per_codebook, *vector),
        "scales": (groups[0], 1, 1, 1),
    }
