"""Bytes of layers from their shapes and the options alone."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from polyquant.plugin import (
    DTYPE_BYTES,
    LayerPlan,
    WeightInfo,
    is_linear,
    module_of,
    plan_dense,
    unfit,
)

from polyquant_codebooks.options import CodebookOptions

BYTES = {**DTYPE_BYTES, "int16": 2}


def plan_layers(weights: Sequence[WeightInfo], config: CodebookOptions) -> list[LayerPlan]:
    """Raises ConfigError for a layer that the format has no place for, and for experts that are fused."""
    return [_planned(weight, config) if is_linear(weight, config) else _dense(weight, config) for weight in weights]


def _planned(weight: WeightInfo, config: CodebookOptions) -> LayerPlan:
    name = module_of(weight)
    try:
        tensors = config.layout(name, weight.shape)
    except ValueError as error:
        raise unfit(weight, str(error)) from error
    return LayerPlan(
        name=weight.name, shape=weight.shape, role=weight.role, bits=config.bits_of(name), scheme=config.scheme,
        stored_bytes=sum(prod(shape) * BYTES[dtype] for shape, dtype in tensors.values()), quantized=True,
    )  # fmt: skip


def _dense(weight: WeightInfo, config: CodebookOptions) -> LayerPlan:
    if weight.role == "experts" and not config.skips(weight):
        raise unfit(weight, "fused experts are not quantized")
    return plan_dense(weight, config)
