"""Options of the Quark backend, and what a checkpoint's quantization_config stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.plugin import NumberFormat, PackableOptions

BITS = {"int4": 4, "uint4": 4, "int8": 8, "fp8": 8, "mxfp4": 4}
GRANULARITIES = {
    "int4": ("group", "channel"),
    "uint4": ("group", "channel"),
    "int8": ("channel", "group"),
    "fp8": ("channel", "tensor"),
    "mxfp4": ("group",),
}
"""Weights -> what may share a scale; the first is the default."""
GROUP_SIZE, MX_GROUP_SIZE = 64, 32

TYPES = {"int4": "int4", "uint4": "uint4", "int8": "int8", "fp8_e4m3": "fp8", "fp4": "mxfp4"}
"""Quark's dtypes -> weights."""
FOLDED = ("smooth", "autosmoothquant", "awq", "gptq", "gptaq", "autoround", "qronos")
"""Algorithms whose result is in the weights and scales alone."""
PACKINGS = ("reorder", "order")


class QuarkOptions(PackableOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights rounded to nearest; activations stay as they are."""

    weights: Annotated[
        Literal["int4", "uint4", "int8", "fp8", "mxfp4"],
        Meta(description="type of a quantized weight; int4 and int8 are symmetric, uint4 has zero points, fp8 is e4m3"),
    ] = "int4"
    granularity: Annotated[
        Literal["group", "channel", "tensor"] | None,
        Meta(description="what shares a scale: a group of a row (int4, mxfp4), a row (int8, fp8) or all of a weight"),
    ] = None
    group_size: Annotated[
        Annotated[int, Meta(ge=8)] | None, Meta(description="weights of a row in a group (64; mxfp4: always 32)")
    ] = None

    def __post_init__(self) -> None:
        allowed = GRANULARITIES[self.weights]
        if self.granularity is None:
            msgspec.structs.force_setattr(self, "granularity", allowed[0])
        if self.granularity not in allowed:
            raise ValueError(f"granularity of {self.weights} must be {' or '.join(allowed)}, not {self.granularity!r}")
        usual = MX_GROUP_SIZE if self.weights == "mxfp4" else GROUP_SIZE
        if self.granularity != "group" and self.group_size is not None:
            raise ValueError(f"group_size applies to granularity='group' only, not to {self.granularity!r}")
        if self.granularity == "group" and self.group_size is None:
            msgspec.structs.force_setattr(self, "group_size", usual)
        if self.weights == "mxfp4" and self.group_size != MX_GROUP_SIZE:
            raise ValueError(f"group_size of mxfp4 is always {MX_GROUP_SIZE}, got {self.group_size}")

    @property
    def number_format(self) -> NumberFormat:
        if self.weights in ("fp8", "mxfp4"):
            return "floats"
        return "integers with zero points" if self.weights == "uint4" else "integers"

    @property
    def weight_bits(self) -> float:
        return BITS[self.weights]

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        return msgspec.convert(_read_stored(stored), cls)


def _read_stored(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The options as plain values. Raises ValueError, saying which part, for what cannot be run as it was meant."""
    scheme, export = stored.get("global_quant_config") or {}, stored.get("export")
    if not export:
        raise ValueError("it has no 'export' entry: a Quark before 1.0 of its format wrote it, which is not read")
    if export.get("weight_format", "real_quantized") != "real_quantized":
        raise ValueError(f"its weights are {export['weight_format']}, not packed; export with 'real_quantized'")
    if export.get("pack_method", "reorder") not in PACKINGS:
        raise ValueError(f"its pack_method is {export['pack_method']!r}; {' and '.join(PACKINGS)} are read")
    for part in ("input_tensors", "output_tensors", "bias"):
        if scheme.get(part):
            raise ValueError(f"it quantizes {part} too, which is not run; export weights alone")
    for part in ("layer_quant_config", "layer_type_quant_config", "kv_cache_quant_config", "softmax_quant_spec"):
        if stored.get(part):
            raise ValueError(f"it has a {part}, which is not read: one scheme for the weights of all layers is")
    for algorithm in stored.get("algo_config") or ():
        if algorithm.get("name") not in FOLDED:
            raise ValueError(f"it was made with {algorithm.get('name')!r}, which changes more than weights; not read")
    skip = stored.get("exclude") or ()
    return {**_weights(scheme.get("weight")), "skip": tuple(skip), "skip_defaults": False}


def _weights(spec: Any) -> dict[str, Any]:
    if not hasattr(spec, "get"):
        raise ValueError("its weights are quantized in several steps, which is not read" if spec else "no weight spec")
    dtype, scheme, axis = str(spec.get("dtype")), str(spec.get("qscheme")), spec.get("ch_axis")
    scale = spec.get("scale_format")
    odd = {
        "is_dynamic": spec.get("is_dynamic"),
        "is_scale_quant": spec.get("is_scale_quant"),
        "scale_format": scale != "e8m0" if dtype == "fp4" else scale not in (None, "float32"),
        "zero_point_type": spec.get("zero_point_type", "int32") != "int32",
        "ch_axis": axis not in {"per_group": (1, -1), "per_channel": (0,)}.get(scheme, (axis,)),
    }
    if dtype not in TYPES:
        raise ValueError(f"its weights are {dtype}; {', '.join(TYPES)} are read")
    if used := [name for name, value in odd.items() if value]:
        raise ValueError(f"of its weights, {', '.join(f'{name} {spec.get(name)!r}' for name in used)} is not read")
    granularity = scheme.removeprefix("per_")
    return {
        "weights": TYPES[dtype],
        "granularity": granularity,
        "group_size": spec.get("group_size") if granularity == "group" else None,
    }
