"""Bytes of FP8 layers from shapes alone. Formats: FP8Linear and FbgemmFp8Linear of
transformers.integrations."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod
from typing import Literal

from msgspec.structs import replace
from polyquant.plugin import (
    BackendOptions,
    LayerPlan,
    PackedFormat,
    WeightInfo,
    is_linear,
    one_expert,
    plan_linears,
    refuse_experts,
    unfit,
)

from polyquant_fp8.options import Float8Options

SCHEME, FP4_SCHEME = "fp8-e4m3", "fp4-e2m1"
FP4_BITS, FP4_GROUP = 4, 32
FP4_STORED = ("int8", "uint8")
"""What experts in FP4 are stored as, two in a byte."""
SCALES = (".weight_scale_inv", ".weight_scale", ".scale")
"""Ends of what the parts of experts that are stored one by one are called in the model."""


def plan_layers(weights: Sequence[WeightInfo], config: Float8Options) -> list[LayerPlan]:
    """Raises ConfigError where experts of a dense checkpoint are fused into one tensor, and are to be the library's.

    And for those that are FP8 in their checkpoint where no matrix of an expert is one of its own.
    """
    for weight in weights:
        if weight.role == "experts" and weight.parts and not is_stack(weight):
            raise unfit(weight, "fused experts that are FP8 in the checkpoint are not read, as those")
    if not any(weight.parts for weight in weights):  # a quantized checkpoint has dense ones as it has them
        refuse_experts(weights, config)
    plans = plan_linears(
        weights, config, SCHEME, lambda weight: quantized_bytes(weight, config), takes=_takes,
        packed=lambda weight: packed_format(config, fp4=is_fp4(weight)),
    )  # fmt: skip
    return [
        replace(plan, bits=FP4_BITS, scheme=FP4_SCHEME) if plan.quantized and is_fp4(weight) else plan
        for plan, weight in zip(plans, weights, strict=True)
    ]


def is_stack(weight: WeightInfo) -> bool:
    """Whether it is experts that the checkpoint holds one by one, packed, and each can be multiplied alone."""
    return weight.stacked == "out_in" and any(name.endswith(SCALES) for name in weight.parts)


def is_fp4(weight: WeightInfo) -> bool:
    """Whether it is experts, or one of them, in FP4 (E2M1) in the file, whatever its config says: some say nothing."""
    name = weight.name.rpartition(".")[2]
    return name != "weight" and weight.parts.get(name) in FP4_STORED


def _takes(weight: WeightInfo, config: BackendOptions) -> bool:
    return is_linear(weight, config) or is_stack(weight)


def packed_format(config: Float8Options, *, fp4: bool = False) -> PackedFormat:
    """The layout of a weight with kernel="packed"."""
    if fp4:
        scale: Literal["bfloat16", "float32"] = "bfloat16" if config.powers_of_two else "float32"
        return PackedFormat(kind="codebook4", group_size=FP4_GROUP, scale_dtype=scale)
    return PackedFormat(kind="float8", group_size=config.block[1] if config.block else -1, scale_dtype="float32")


def quantized_bytes(weight: WeightInfo, config: Float8Options) -> int:
    """A byte a weight, or half of one, and the scales: float32 or a byte each."""
    if is_fp4(weight):  # of all experts or of one
        return prod(weight.shape) // 2 + prod(weight.shape) // FP4_GROUP * (1 if config.powers_of_two else 4)
    if weight.role == "experts":
        return weight.shape[0] * quantized_bytes(one_expert(weight), config)
    scales = prod(scale_shape(weight.shape, config)) * (1 if config.powers_of_two else 4)
    return prod(weight.shape) + scales + (4 if config.static_activations else 0)


def scale_shape(shape: tuple[int, ...], config: Float8Options) -> tuple[int, ...]:
    """Shape of a layer's scales; blocks at the edges may be smaller."""
    if config.block is None:
        return ()
    return tuple(1 if size == -1 else ceil(length / size) for length, size in zip(shape, config.block, strict=True))
