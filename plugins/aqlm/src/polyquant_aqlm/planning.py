"""Bytes of AQLM's layers from shapes alone, and which layers it can take. Format: aqlm.inference.QuantizedLinear."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from polyquant.errors import ConfigError
from polyquant.plugin import DTYPE_BYTES, LayerPlan, WeightInfo, module_of, plan_linears

from polyquant_aqlm.options import AqlmOptions

SCHEME = "aqlm"


def plan_layers(weights: Sequence[WeightInfo], config: AqlmOptions) -> list[LayerPlan]:
    """Raises ConfigError where groups do not fit a layer, or experts are fused into one tensor."""
    for weight in weights:
        if weight.role == "experts" and not config.skips(weight):
            raise ConfigError(
                f"{weight.name} holds the experts of a layer in one tensor {weight.shape}: "
                "AQLM checkpoints of such models are not read"
            )
    return plan_linears(weights, config, SCHEME, lambda weight: quantized_bytes(weight, config))


def quantized_bytes(weight: WeightInfo, config: AqlmOptions) -> int:
    """Codes, and codebooks and scales in the compute dtype. Raises ConfigError where groups do not come out even."""
    sizes = zip(
        ("out_features", "in_features"), weight.shape, (config.out_group_size, config.in_group_size), strict=True
    )
    for dimension, length, size in sizes:
        if length % size:
            raise ConfigError(
                f"{module_of(weight)} has {dimension} {length}, which groups of {size} do not divide; keep it dense"
            )
    dtype_bytes = DTYPE_BYTES[weight.dtype]
    code_bytes = 1 if config.nbits_per_codebook <= 8 else 2
    element_bytes = {"codes": code_bytes, "codebooks": dtype_bytes, "scales": dtype_bytes}
    return sum(prod(shape) * element_bytes[name] for name, shape in packed_shapes(weight.shape, config).items())


def packed_shapes(shape: tuple[int, ...], config: AqlmOptions) -> dict[str, tuple[int, ...]]:
    """Shapes of the codes, codebooks and scales of a layer. shape: (out_features, in_features)."""
    rows, columns = shape[0] // config.out_group_size, shape[1] // config.in_group_size
    return {
        "codes": (rows, columns, config.num_codebooks),
        "codebooks": (
            config.num_codebooks, 2**config.nbits_per_codebook, config.out_group_size, config.in_group_size,
        ),
        "scales": (rows, 1, 1, 1),
    }  # fmt: skip
