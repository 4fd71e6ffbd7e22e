"""Bytes of quanto's layers from shapes alone. Format: optimum.quanto.nn.qmodule, optimum.quanto.tensor.packed."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod
from typing import Any

from polyquant.plugin import DTYPE_BYTES, LayerPlan, PackedFormat, WeightInfo, plan_linears

from polyquant_quanto.options import QuantoOptions, group_size

SIZES = {"uint8": 1, "int8": 1, "float8_e4m3fn": 1, "float": 4}
"""Bytes of an element; 'float': of the scales of activations, float32 scalars, unused but there."""


def plan_layers(weights: Sequence[WeightInfo], config: QuantoOptions) -> list[LayerPlan]:
    return plan_linears(
        weights,
        config,
        config.weights,
        lambda weight: quantized_bytes(weight.shape, config.weights, DTYPE_BYTES[weight.dtype]),
        packed=lambda weight: packed_format(weight, config.weights),
    )


def packed_format(weight: WeightInfo, weights: str) -> PackedFormat | None:
    """The layout of a weight with kernel="packed"; None: int2, which would take twice the memory."""
    scale: Any = weight.dtype  # the compute dtype, as quanto has it
    if weights in ("int8", "float8"):
        return PackedFormat(kind=weights, group_size=-1, scale_dtype=scale)  # type: ignore[arg-type]
    if weights != "int4":
        return None
    size = group_size(weight.shape[1]) or -1
    return PackedFormat(kind="affine4", group_size=size, scale_dtype=scale, offsets="minima")


def quantized_bytes(shape: tuple[int, ...], weights: str, dtype_bytes: int) -> int:
    """Packed weight with scales and shifts.

    shape: (out_features, in_features); dtype_bytes: of one scale or shift, in the compute dtype.
    """
    parts = stored_parts(shape, weights)
    return sum(prod(size) * (dtype_bytes if size and kind == "float" else SIZES[kind]) for size, kind in parts.values())


def stored_parts(shape: tuple[int, ...], weights: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype) of what a checkpoint holds of a layer: codes, scales, shifts, and activations' scales.

    shape: (out_features, in_features). Scales and shifts are in the compute dtype, those of activations in float32.
    """
    rows, columns = shape
    activations: dict[str, tuple[tuple[int, ...], str]] = {"input_scale": ((), "float"), "output_scale": ((), "float")}
    if weights in ("int8", "float8"):
        codes = "int8" if weights == "int8" else "float8_e4m3fn"
        return {"weight._data": (shape, codes), "weight._scale": ((rows, 1), "float"), **activations}
    if group := group_size(columns):
        rows, columns = prod(shape) // group, group
    packed = (ceil(rows / (4 if weights == "int2" else 2)), columns)
    floats = dict.fromkeys(("weight._scale", "weight._shift"), ((rows, 1), "float"))
    return {"weight._data._data": (packed, "uint8"), **floats, **activations}
