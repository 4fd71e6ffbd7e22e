"""Options of the rowwise backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.errors import Misfit
from polyquant.plugin import ExpertsOptions, HeldWeight

QUANT_METHOD = "rowwise"  # how config.json names the format


class RowwiseOptions(ExpertsOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """8 bit, symmetric, rounded to nearest; one scale for each output row."""

    # Replace: your options. Each has a type, a default and a description, which is the command line's help. Derive from
    # PackableOptions where you have no hook quantize_linear, from BackendOptions where your weights have no place in
    # polyquant's packed layout.
    bits: Annotated[Literal[8], Meta(description="bits of a quantized weight")] = 8
    scale_dtype: Annotated[
        Literal["float32", "bfloat16"], Meta(description="dtype of the scales: 4 or 2 bytes for each output row")
    ] = "float32"

    @property
    def weight_bits(self) -> float:
        return self.bits

    def to_stored(self) -> dict[str, Any]:
        """The `quantization_config` of a saved model's config.json. Replace: the library's own, where it has one."""
        return {
            "quant_method": QUANT_METHOD,
            "bits": self.bits,
            "scale_dtype": self.scale_dtype,
            "compute_dtype": self.compute_dtype,
            "modules_to_not_convert": self.stored_skip,
        }

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        """The options back from what `to_stored` wrote."""
        skip = stored["modules_to_not_convert"]
        values = {
            "bits": stored["bits"],
            "scale_dtype": stored["scale_dtype"],
            "compute_dtype": stored["compute_dtype"],
            "skip": tuple(skip or ()),
            "skip_defaults": skip is None,
        }
        return msgspec.convert(values, cls)

    @classmethod
    def holding(cls, weights: Sequence[HeldWeight]) -> dict[str, Any]:
        """The options that hold weights of another format as they are, for `polyquant convert`."""
        for weight in weights:
            own = (weight.kind, weight.bits, weight.zero_points, weight.columns_of_a_scale, weight.ordered)
            if own != ("integers", 8, "middle", -1, False):
                raise Misfit("bits", "integers of 8 bits without zero points, with a scale a row, are held")
        return {"scale_dtype": "bfloat16" if {weight.scale_dtype for weight in weights} == {"bfloat16"} else "float32"}
