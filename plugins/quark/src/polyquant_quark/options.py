"""Options of the Quark backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.plugin import BackendOptions

from polyquant_quark.stored import read_stored

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


class QuarkOptions(BackendOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
    def weight_bits(self) -> float:
        return BITS[self.weights]

    def native(self) -> Any:
        """Quark's QTensorConfig of the weights. Imports the library, for many seconds."""
        from polyquant_quark.native import tensor_config

        return tensor_config(self)

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        return msgspec.convert(read_stored(stored), cls)
