"""Options of the quanto backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.plugin import ExpertsOptions, NumberFormat

BITS = {"int8": 8, "float8": 8, "int4": 4, "int2": 2}


class QuantoOptions(ExpertsOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights only. 8 bit: one scale for each output row; 4 and 2 bit: scale and shift for each group of a row."""

    weights: Annotated[
        Literal["int8", "int4", "int2", "float8"], Meta(description="type of a quantized weight; float8 is e4m3")
    ] = "int8"

    @property
    def number_format(self) -> NumberFormat:
        if self.weights == "float8":
            return "floats"
        return "integers" if self.weights == "int8" else "integers with zero points"

    @property
    def weight_bits(self) -> float:
        return BITS[self.weights]

    def to_stored(self) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint: transformers' QuantoConfig, and the compute dtype."""
        return {
            "quant_method": "quanto",
            "weights": self.weights,
            "activations": None,
            "modules_to_not_convert": self.stored_skip,
            "compute_dtype": self.compute_dtype,
        }

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        if stored.get("activations"):
            raise ValueError(f"activations are quantized to {stored['activations']}; only weight quantization is read")
        skip = stored.get("modules_to_not_convert")
        values = {
            "weights": stored["weights"],
            "compute_dtype": stored.get("compute_dtype", "auto"),
            "skip": tuple(skip or ()),
            "skip_defaults": skip is None,
        }
        return msgspec.convert(values, cls)
