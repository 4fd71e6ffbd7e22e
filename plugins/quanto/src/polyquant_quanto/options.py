"""Options of the quanto backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.errors import Misfit
from polyquant.plugin import ExpertsOptions, HeldWeight, NumberFormat

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
    def holding(cls, weights: Sequence[HeldWeight]) -> dict[str, Any]:
        """int8 and float8 with a scale a row; int4 in the groups that quanto gives layers of that width."""
        kinds = {(weight.kind, weight.bits) for weight in weights}
        names = {("integers", 8): "int8", ("floats", 8): "float8", ("integers", 4): "int4"}
        if len(kinds) > 1 or not kinds <= set(names):
            raise Misfit("bits", "its codes are no integers of one width, nor floats of 8 bits, and those are held")
        if any(weight.ordered for weight in weights):
            raise Misfit("act-order", "its columns belong to groups in an order of their own, and quanto's follow")
        name = names[kinds.pop()]
        if name == "int8" and any(weight.zero_points != "middle" for weight in weights):
            raise Misfit("zero points", "its codes of 8 bits have fitted zero points, and int8 has none")
        for weight in weights:
            size = (group_size(weight.shape[1]) if name == "int4" else None) or weight.shape[1]
            if weight.group_size % size:
                raise Misfit(
                    "group size", f"its groups are of {weight.group_size} columns, and {name}'s of {size} here"
                )
        return {"weights": name}

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


def group_size(in_features: int) -> int | None:
    """The largest of 128, 96, 64 and 32 that divides in_features; None, one group a row, where none does."""
    return next((size for size in (128, 96, 64, 32) if in_features > 128 and in_features % size == 0), None)
