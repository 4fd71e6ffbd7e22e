"""Options of the torchao backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.plugin import ExpertsOptions, NumberFormat

INT4_GROUP = 32
TYPES: Mapping[str, Mapping[str, Any]] = {
    "Int8WeightOnlyConfig": {"weights": "int8"},
    "Int8DynamicActivationInt8WeightConfig": {"weights": "int8", "dynamic_activations": True},
    "IntxWeightOnlyConfig": {"weights": "int4"},
    "Float8WeightOnlyConfig": {"weights": "float8"},
}
"""torchao's config classes that are read, as the options they stand for."""


class TorchAoOptions(ExpertsOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """int8 and float8: one scale for each output row. int4: for each group of a row, kept in int8 (no CPU packing)."""

    weights: Annotated[
        Literal["int8", "int4", "float8"],
        Meta(description="type of a quantized weight; int4 is stored in int8, a byte each; float8 is e4m3"),
    ] = "int8"
    dynamic_activations: Annotated[
        bool, Meta(description="int8: quantize activations to int8 too, token by token while running")
    ] = False
    group_size: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="int4: weights that share a scale, along in_features (32)")
    ] = None

    def __post_init__(self) -> None:
        if self.dynamic_activations and self.weights != "int8":
            raise ValueError(f"dynamic_activations applies to weights='int8' only, not to {self.weights!r}")
        if self.group_size is not None and self.weights != "int4":
            raise ValueError(f"group_size applies to weights='int4' only; {self.weights!r} has one scale a row")
        if self.group_size is None and self.weights == "int4":
            msgspec.structs.force_setattr(self, "group_size", INT4_GROUP)

    @property
    def rounds_activations(self) -> bool:
        return self.dynamic_activations

    @property
    def number_format(self) -> NumberFormat:
        return "floats" if self.weights == "float8" else "integers"

    @property
    def level_bits(self) -> float:
        return 4 if self.weights == "int4" else 8

    @property
    def weight_bits(self) -> float:
        """8 for int4 too: what is stored."""
        return 8

    @property
    def scheme(self) -> str:
        """int8, int8-dynamic, int4-in-int8 or float8."""
        suffix = {"int8": "-dynamic" if self.dynamic_activations else "", "int4": "-in-int8"}
        return self.weights + suffix.get(self.weights, "")

    def to_stored(self) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint, with torchao's config as torchao writes it. Imports torchao."""
        from polyquant_torchao._library import quantize_config

        stored: dict[str, Any] = quantize_config(self).to_dict()
        return stored

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        quant_type = stored["quant_type"]["default"]
        kind, data = quant_type["_type"], quant_type["_data"]
        if kind not in TYPES:
            raise ValueError(f"its torchao config is {kind}; {', '.join(TYPES)} are read")
        values: dict[str, Any] = dict(TYPES[kind])
        if values["weights"] == "int4":
            dtype, granularity = data["weight_dtype"]["_data"], data["granularity"]
            if dtype != "int4" or granularity["_type"] != "PerGroup":
                raise ValueError(f"its weights are {dtype} with {granularity['_type']}; int4 with PerGroup is read")
            values["group_size"] = granularity["_data"]["group_size"]
        if stored.get("include_input_output_embeddings"):
            raise ValueError("its embeddings are quantized too, which is not read")
        skip = stored.get("modules_to_not_convert")
        values |= {
            "compute_dtype": stored.get("compute_dtype", "auto"),
            "skip": tuple(skip or ()),
            "skip_defaults": skip is None,
        }
        return msgspec.convert(values, cls)
