"""Options of the GPTQ and AWQ backends. Both have what gptqmodel's layers ask for: bits, group_size, sym, desc_act."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.plugin import HeldWeight, NumberFormat
from polyquant.plugin.formats import GEMM, AwqFormat, GptqFormat, gptq_layout, has_zero_points

MARLIN, GEMV, GEMV_FAST = "marlin", "gemv", "gemv_fast"
LAYOUTS = ("gptq", "gptq_v2", MARLIN)
UNREAD = ("activation", "adapter", "rotation")
KERNEL = Meta(
    description="what multiplies: packed: polyquant's own layout and kernels, on a CPU; library: torch_aten or torch "
    "on a CPU, gptqmodel's choice elsewhere; auto: packed where polyquant-kernels is installed, in float32"
)


class GptqOptions(GptqFormat, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A scale and a zero point for each group of weights, rounded so that calibration text changes least."""

    kernel: Annotated[
        Literal["auto", "packed", "library", "torch_aten", "torch", "triton", "exllama_v2", "marlin"], KERNEL
    ] = "auto"  # type: ignore[assignment]  # the library has several of its own

    method: ClassVar[str] = "gptq"
    per_layer: ClassVar[tuple[str, ...]] = ("bits", "group_size", "sym", "desc_act")
    """What a rule of gptqmodel's `dynamic` may change for a layer."""

    @property
    def written_layout(self) -> str:
        """The layout that is written: with fitted zero points, the one that can hold all of them."""
        return "gptq" if self.sym else "gptq_v2"

    def to_stored(self) -> dict[str, Any]:
        return super().to_stored() | {"checkpoint_format": self.written_layout}

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        """Raises ValueError for a layout or a variant that the kernels here do not read."""
        if (layout := stored_layout(stored)) not in LAYOUTS:
            raise ValueError(f"its format is {layout!r}, and {', '.join(LAYOUTS)} are read")
        if unread := [name for name in UNREAD if stored.get(name)]:
            raise ValueError(f"it uses {', '.join(unread)}, which is not read")
        _refuse_variants(stored, cls.per_layer)
        config = super().from_stored(stored)
        if layout == MARLIN and (config.bits != 4 or not config.sym or config.desc_act):
            raise ValueError(
                "its format is 'marlin', which has symmetric 4-bit weights, in order, and its config denies it"
            )
        return config


class AwqOptions(AwqFormat, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Columns that calibration text activates most are scaled up before rounding, so that they lose least."""

    zero_point: Annotated[bool, Meta(description="zero point fitted, instead of in the middle of the range")] = True
    kernel: Annotated[
        Literal["auto", "packed", "library", "torch_aten", "torch", "gemm", "gemm_triton", "exllama_v2", "marlin"],
        KERNEL,
    ] = "auto"  # type: ignore[assignment]  # the library has several of its own

    method: ClassVar[str] = "awq"
    per_layer: ClassVar[tuple[str, ...]] = ("bits", "group_size", "sym", "zero_point")
    desc_act: ClassVar[bool] = False
    written_layout: ClassVar[str] = GEMM
    versions: ClassVar[tuple[str, ...]] = (GEMM, GEMV, GEMV_FAST)

    @property
    def sym(self) -> bool:
        """gptqmodel's word for layers without fitted zero points."""
        return not self.zero_point

    @property
    def number_format(self) -> NumberFormat:
        return "integers with zero points" if self.zero_point else "integers"

    def to_stored(self) -> dict[str, Any]:
        return super().to_stored() | {"zero_point": self.zero_point}

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        """Raises ValueError for an order of the weights, or a variant, that the kernels here do not read."""
        config = super().from_stored(stored)
        _refuse_variants(stored, cls.per_layer)
        return msgspec.structs.replace(config, zero_point=has_zero_points(stored))

    @classmethod
    def holding(cls, weights: Sequence[HeldWeight]) -> dict[str, Any]:
        return super().holding(weights) | {"zero_point": any(weight.zero_points != "middle" for weight in weights)}


Options = GptqOptions | AwqOptions


def stored_layout(stored: Mapping[str, Any]) -> str:
    """The layout that a GPTQ checkpoint names; older ones have a mark of their own for marlin."""
    return MARLIN if stored.get("is_marlin_format") else gptq_layout(stored)


def _refuse_variants(stored: Mapping[str, Any], per_layer: tuple[str, ...]) -> None:
    """Raises ValueError for other words than int32, and for layers with options of their own."""
    if stored.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise ValueError(f"it is packed in {stored['pack_dtype']}, and only int32 is read")
    rules: Mapping[str, Mapping[str, Any]] = stored.get("dynamic") or {}
    own = [
        name
        for name, rule in rules.items()
        if not name.startswith("-")  # such a rule leaves layers dense
        and any(rule.get(key, stored.get(key)) != stored.get(key) for key in per_layer)
    ]
    if own:
        raise ValueError(f"it gives layers different options ({', '.join(own[:3])}), which is not read")
