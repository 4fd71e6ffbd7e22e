"""Options of the SINQ backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.plugin import ExpertsOptions, NumberFormat, RoundingMethod


class SinqOptions(ExpertsOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A scale for each group of a row and one for each column, balanced so that no outlier sets a group's step."""

    bits: Annotated[Literal[2, 3, 4, 5, 6, 8], Meta(description="bits of a quantized weight")] = 4
    group_size: Annotated[
        int,
        Meta(ge=16, multiple_of=8, description="weights of a row that share a scale and zero point; a multiple of 8"),
    ] = 64
    tiling: Annotated[
        Literal["1D", "2D"],
        Meta(description="columns are scaled over the whole height (1D), or in square tiles of group_size (2D)"),
    ] = "1D"
    method: Annotated[
        Literal["sinq", "asinq"],
        Meta(description="asinq weighs columns by sample activations; it is read from checkpoints, not made here"),
    ] = "sinq"

    @property
    def rounding_method(self) -> RoundingMethod:
        return "fitted" if self.method == "sinq" else "calibrated"

    @property
    def number_format(self) -> NumberFormat:
        return "integers with zero points"

    @property
    def weight_bits(self) -> float:
        return self.bits

    @property
    def scheme(self) -> str:
        """sinq2 to sinq8."""
        return f"sinq{self.bits}"

    def quantizer_arguments(self) -> dict[str, Any]:
        """The arguments of sinq's Quantizer; `quantAux`: scales and zero points are rounded to 8 bits."""
        return {
            "nbits": self.bits,
            "group_size": self.group_size,
            "axis": 1,
            "round_zero": self.bits == 4,
            "tiling_mode": self.tiling,
            "method": "sinq_quantAux",
        }

    def to_stored(self) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint: transformers' SinqConfig, with full names of dense modules."""
        return {
            "quant_method": "sinq",
            "nbits": self.bits,
            "group_size": self.group_size,
            "tiling_mode": self.tiling,
            "method": self.method,
            "modules_to_not_convert": list(self.skip),
            "compute_dtype": self.compute_dtype,
            "skip_defaults": self.skip_defaults,
        }

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        values = {
            "bits": stored["nbits"],
            "group_size": stored["group_size"],
            "tiling": stored["tiling_mode"],
            "method": stored["method"],
            "compute_dtype": stored.get("compute_dtype", "auto"),
            "skip": tuple(stored.get("modules_to_not_convert") or ()),
            "skip_defaults": stored.get("skip_defaults", False),
        }
        return msgspec.convert(values, cls)
