"""Options of the Four Over Six backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.errors import Misfit
from polyquant.plugin import E2M1, ExpertsOptions, HeldWeight, NumberFormat, RoundingMethod

from polyquant_fouroversix.formats import BLOCK, RULES, STATIC, SWIZZLED

OWN = {"compute_dtype", "quantize_activations", "skip_defaults"}
"""What polyquant adds to the library's settings."""
READ = {"quant_method", "dtype", "scale_rule", "weight_scale_2d", "modules_to_not_convert", *OWN}
SAME = {
    "activation_dtype": "dtype", "weight_dtype": "dtype", "activation_scale_rule": "scale_rule",
    "weight_scale_rule": "scale_rule",
}  # fmt: skip
"""Settings that are read where they repeat another."""
NO_MATTER = {
    "matmul_backend", "quantize_backend", "output_dtype", "gradient_dtype", "gradient_scale_rule",
    "activation_round_style", "gradient_round_style", "weight_round_style",
}  # fmt: skip
"""Settings that say how to compute or train, and not what is stored."""
ABSENT = ("keep_master_weights", "module_config_overrides")
"""Settings that are read where they are off."""


class FouroversixOptions(ExpertsOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """4-bit numbers in small blocks with a scale each; Four Over Six scales each block to the better of 4 and 6."""

    dtype: Annotated[
        Literal["nvfp4", "mxfp4", "if4", "nvint4"],
        Meta(description="format; if4: each block is FP4 or INT4, whichever is closer"),
    ] = "nvfp4"
    scale_rule: Annotated[
        Literal["mse", "mae", "abs_max", "static_6", "static_4"],
        Meta(description="what to minimize when choosing a block's scale; static_6 is plain NVFP4 or MXFP4"),
    ] = "mse"
    weight_scale_2d: Annotated[
        bool, Meta(description="one scale for a square of blocks, 16 x 16, as quantized training wants it")
    ] = False
    quantize_activations: Annotated[
        bool,
        Meta(
            description="round activations to the format too, as GPU kernels of 4-bit matrix units do; not with "
            "kernel='packed'"
        ),
    ] = True

    load_time: ClassVar[frozenset[str]] = ExpertsOptions.load_time | {"quantize_activations"}

    def __post_init__(self) -> None:
        rules = RULES[self.dtype]
        if self.scale_rule not in rules:
            allowed = " or ".join(map(repr, rules))
            raise ValueError(f"scale_rule of {self.dtype} must be {allowed}, got {self.scale_rule!r}")
        if self.weight_scale_2d and self.dtype != "nvfp4":
            raise ValueError(f"weight_scale_2d is for nvfp4, not {self.dtype}")

    @property
    def rounding_method(self) -> RoundingMethod:
        return "nearest" if self.scale_rule in STATIC else "fitted"

    @property
    def rounds_activations(self) -> bool:
        return self.quantize_activations

    @property
    def number_format(self) -> NumberFormat:
        return "integers" if self.dtype == "nvint4" else "floats"

    @property
    def weight_bits(self) -> float:
        return 4

    def to_stored(self) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint: transformers' FourOverSixConfig, and what polyquant adds."""
        return {
            "quant_method": "fouroversix",
            "dtype": self.dtype,
            "scale_rule": self.scale_rule,
            "weight_scale_2d": self.weight_scale_2d,
            "modules_to_not_convert": list(self.skip),
            "output_dtype": self.compute_dtype,
            **{name: getattr(self, name) for name in sorted(OWN)},
        }

    @classmethod
    def holding(cls, weights: Sequence[HeldWeight]) -> dict[str, Any]:
        """MXFP4 and NVFP4, whose activations are left as they are."""
        kinds = {(weight.table, weight.group_size) for weight in weights}
        name = next((name for name in SWIZZLED if kinds == {(E2M1, BLOCK[name])}), None)
        if name is None or any(weight.ordered for weight in weights):
            own = " and ".join(sorted({f"{weight.kind} of {weight.bits} bits" for weight in weights}))
            raise Misfit("bits", f"its codes are {own}, and E2M1 in groups of 32 (MXFP4) or 16 (NVFP4) is held")
        return {"dtype": name, "scale_rule": "static_6", "quantize_activations": False}

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        stored = {
            name: value for name, value in stored.items() if value is not None or name == "modules_to_not_convert"
        }
        unread = sorted(name for name in set(stored) - READ - NO_MATTER if not _agrees(name, stored))
        if unread:
            raise ValueError("; ".join(f"its {name} is {stored[name]!r}, which is not read" for name in unread))
        dense, defaults = stored.get("modules_to_not_convert", ("lm_head",)), stored.get("skip_defaults", False)
        values: dict[str, Any] = {name: stored[name] for name in set(stored) & (READ - {"quant_method"})}
        values |= {"skip": () if defaults else tuple(dense or ()), "skip_defaults": defaults}
        values.pop("modules_to_not_convert", None)
        return msgspec.convert(values, cls)


def _agrees(name: str, stored: Mapping[str, Any]) -> bool:
    if name in SAME:
        defaults = {"dtype": "nvfp4", "scale_rule": "mse"}
        return bool(stored[name] == stored.get(SAME[name], defaults[SAME[name]]))
    return name in ABSENT and not stored[name]
