"""Bytes of FP8 layers from shapes alone. Format: transformers.integrations.finegrained_fp8.FP8Linear."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

from polyquant.plugin import LayerPlan, PackedFormat, WeightInfo, plan_linears, refuse_experts, unfit

from polyquant_fp8.options import Fp8Options

SCHEME = "fp8-e4m3"


def plan_layers(weights: Sequence[WeightInfo], config: Fp8Options) -> list[LayerPlan]:
    """Raises ConfigError where experts of a dense checkpoint are fused into one tensor, and are to be the library's.

    And for those that are FP8 in their checkpoint.
    """
    for weight in weights:
        if weight.role == "experts" and weight.parts:
            raise unfit(weight, "fused experts that are FP8 in the checkpoint are not read, as those")
    if not any(weight.parts for weight in weights):  # a quantized checkpoint has dense ones as it has them
        refuse_experts(weights, config)
    return plan_linears(
        weights, config, SCHEME, lambda weight: quantized_bytes(weight, config), packed=lambda _: packed_format(config)
    )


def packed_format(config: Fp8Options) -> PackedFormat:
    """The layout of every weight with kernel="packed"."""
    return PackedFormat(kind="float8", group_size=config.block_columns or -1, scale_dtype="float32")


def quantized_bytes(weight: WeightInfo, config: Fp8Options) -> int:
    """A byte a weight, and the scales: float32 or a byte each."""
    scales = prod(scale_shape(weight.shape, config)) * (1 if config.scale_fmt == "ue8m0" else 4)
    return prod(weight.shape) + scales + (4 if config.activation_scheme == "static" else 0)


def scale_shape(shape: tuple[int, ...], config: Fp8Options) -> tuple[int, ...]:
    """Shape of weight_scale_inv; blocks at the edges may be smaller."""
    if config.block is None:
        return ()
    return tuple(ceil(length / size) for length, size in zip(shape, config.block, strict=True))
