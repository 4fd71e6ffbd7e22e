"""Options of the HQQ backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.errors import Misfit
from polyquant.plugin import ExpertsOptions, HeldWeight, NumberFormat, RoundingMethod


class HqqOptions(ExpertsOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Scale and zero point for each group of weights, the zero point fitted by half-quadratic optimization."""

    bits: Annotated[Literal[1, 2, 3, 4, 8], Meta(description="bits of a quantized weight")] = 4
    group_size: Annotated[
        int, Meta(ge=8, multiple_of=8, description="weights that share one scale and zero point; a multiple of 8")
    ] = 64
    axis: Annotated[Literal[0, 1], Meta(description="groups run along out_features (0) or in_features (1)")] = 1
    optimize: Annotated[
        bool,
        Meta(
            description="fit the zero points; without, plain rounding: many times faster, less exact at 4 bit and below"
        ),
    ] = True

    @property
    def rounding_method(self) -> RoundingMethod:
        return "fitted" if self.optimize else "nearest"

    @property
    def number_format(self) -> NumberFormat:
        return "integers with zero points"

    @property
    def weight_bits(self) -> float:
        return self.bits

    @property
    def scheme(self) -> str:
        """hqq1 to hqq8."""
        return f"hqq{self.bits}"

    def quantize_config(self) -> dict[str, Any]:
        """hqq's own BaseQuantizeConfig, a dict. Imports hqq."""
        from hqq.core.quantize import BaseQuantizeConfig

        config: dict[str, Any] = BaseQuantizeConfig(nbits=self.bits, group_size=self.group_size, axis=self.axis)
        config["weight_quant_params"]["optimize"] = self.optimize
        return config

    def to_stored(self) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint, as transformers 4 wrote it, with full names of dense modules."""
        extra = {"compute_dtype": self.compute_dtype, "skip_defaults": self.skip_defaults}
        return {"quant_method": "hqq", "quant_config": self.quantize_config(), "skip_modules": list(self.skip), **extra}

    @classmethod
    def holding(cls, weights: Sequence[HeldWeight]) -> dict[str, Any]:
        """Zero points are numbers: minima that are no multiples of the scales are held, too."""
        bits = {weight.bits if weight.kind == "integers" else 0 for weight in weights}
        if len(bits) > 1 or bits == {0}:
            raise Misfit("bits", "its codes are no integers of one width, and integers of 4 or 8 bits are held")
        if any(weight.ordered for weight in weights):
            raise Misfit("act-order", "its columns belong to groups in an order of their own, and hqq's follow")
        size = gcd(*(weight.group_size for weight in weights))
        if size % 8:
            raise Misfit("group size", f"its groups are of {size} columns, and multiples of 8 are held")
        return {"bits": bits.pop(), "group_size": size}

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        params = stored["quant_config"].get("weight_quant_params")
        if params is None:
            raise ValueError("it gives layers different options, which is not read")
        unread = {"view_as_float": params.get("view_as_float"), "channel_wise": not params.get("channel_wise", True)}
        unread |= {
            name: stored["quant_config"].get(name)
            for name in ("scale_quant_params", "zero_quant_params", "offload_meta")
        }
        if any(unread.values()):
            raise ValueError(f"it uses {', '.join(name for name, used in unread.items() if used)}, which is not read")
        defaults = stored.get("skip_defaults", False)
        values = {
            "bits": params["nbits"],
            "group_size": params["group_size"],
            "axis": params["axis"],
            "optimize": params.get("optimize", True),
            "compute_dtype": stored.get("compute_dtype", "auto"),
            "skip": () if defaults else tuple(stored.get("skip_modules") or ()),
            "skip_defaults": defaults,
        }
        return msgspec.convert(values, cls)
