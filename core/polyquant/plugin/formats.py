"""GPTQ and AWQ as checkpoints name them: the options that every library of a format has, and the words each writes.

A backend derives its options from one of these records, adds its own, and refuses what its library does not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import msgspec
from msgspec import Meta

from polyquant.errors import Misfit
from polyquant.options import NumberFormat, RoundingMethod
from polyquant.packable import PackableOptions
from polyquant.plugin.layouts import integers_held
from polyquant.types import HeldWeight

GEMM = "gemm"
"""AWQ's version whose words run along out_features; those of the other versions are in orders of their own."""
GptqGroup = Literal[-1, 16, 32, 64, 128, 256, 512, 1024]
AwqGroup = Literal[-1, 16, 32, 64, 128, 256]
GPTQ_GROUPS, AWQ_GROUPS = get_args(GptqGroup), get_args(AwqGroup)
GROUP = "weights along in_features that share one scale and zero point; -1: all of them"


class GptqFormat(PackableOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A scale and a zero point for each group of weights, rounded so that calibration text changes least."""

    bits: Annotated[Literal[2, 3, 4, 8], Meta(description="bits of a quantized weight")] = 4
    group_size: Annotated[GptqGroup, Meta(description=GROUP)] = 128
    desc_act: Annotated[
        bool, Meta(description="quantize the columns that matter most first; a little closer, a little slower")
    ] = False
    sym: Annotated[bool, Meta(description="zero point in the middle of the range, instead of fitted")] = True

    @property
    def rounding_method(self) -> RoundingMethod:
        return "calibrated"

    @property
    def number_format(self) -> NumberFormat:
        return "integers" if self.sym else "integers with zero points"

    @property
    def weight_bits(self) -> float:
        return self.bits

    @property
    def scheme(self) -> str:
        """gptq2 to gptq8."""
        return f"gptq{self.bits}"

    def to_stored(self) -> dict[str, Any]:
        """`skip_modules` is polyquant's own addition."""
        return {
            "quant_method": "gptq", "bits": self.bits, "group_size": self.group_size, "desc_act": self.desc_act,
            "sym": self.sym, "lm_head": not self.skip_defaults and not self.skip, "skip_modules": list(self.skip),
        }  # fmt: skip

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        """Reads what auto-gptq (the old names too), optimum, gptqmodel and polyquant write, whatever the layout."""
        values = {
            "bits": stored.get("bits", stored.get("wbits")),
            "group_size": stored.get("group_size", stored.get("groupsize", -1)),
            "desc_act": bool(stored.get("desc_act", False)),
            "sym": bool(stored.get("sym", True)),
        }
        return msgspec.convert(values | _stored_skips(stored), cls)

    @classmethod
    def holding(cls, weights: Sequence[HeldWeight]) -> dict[str, Any]:
        return integers_held(weights, (4, 8), GPTQ_GROUPS)


class AwqFormat(PackableOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Columns that calibration text activates most are scaled up before rounding, so that they lose least."""

    bits: Annotated[Literal[4], Meta(description="bits of a quantized weight")] = 4
    group_size: Annotated[AwqGroup, Meta(description=GROUP)] = 128

    versions: ClassVar[tuple[str, ...]] = (GEMM,)
    """Those that the backend reads."""

    @property
    def rounding_method(self) -> RoundingMethod:
        return "calibrated"

    @property
    def number_format(self) -> NumberFormat:
        return "integers with zero points"

    @property
    def weight_bits(self) -> float:
        return self.bits

    @property
    def scheme(self) -> str:
        """awq4."""
        return f"awq{self.bits}"

    def to_stored(self) -> dict[str, Any]:
        """With zero points; `skip_modules` is polyquant's own addition."""
        return {
            "quant_method": "awq", "bits": self.bits, "group_size": self.group_size, "zero_point": True,
            "version": GEMM, "lm_head": not self.skip_defaults and not self.skip, "skip_modules": list(self.skip),
        }  # fmt: skip

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        """Reads what autoawq (w_bit, q_group_size, version), transformers, gptqmodel and polyquant write.

        Raises ValueError for weights in an order that is none of `versions`.
        """
        if (version := awq_version(stored)) not in cls.versions:
            raise ValueError(f"its version is {version!r}, and {', '.join(map(repr, cls.versions))} is read")
        if stored.get("backend") == "llm-awq":
            raise ValueError(f"it was written by llm-awq, in an order of its own; only {GEMM!r} is read")
        values = {
            "bits": stored.get("bits", stored.get("w_bit", 4)),
            "group_size": stored.get("group_size", stored.get("q_group_size", 128)),
        }
        return msgspec.convert(values | _stored_skips(stored), cls)

    @classmethod
    def holding(cls, weights: Sequence[HeldWeight]) -> dict[str, Any]:
        """Zero points are held whether they are fitted or not."""
        if any(weight.ordered for weight in weights):
            raise Misfit("act-order", "its columns belong to groups in an order of their own, and AWQ's follow")
        held = integers_held(weights, (4,), AWQ_GROUPS)
        return {name: held[name] for name in ("bits", "group_size")}


def gptq_layout(stored: Mapping[str, Any]) -> str:
    """The layout that a quantization_config names; auto-gptq names none. Zero points are stored less one in 'gptq'."""
    return str(stored.get("checkpoint_format") or stored.get("format") or "gptq").lower()


def awq_version(stored: Mapping[str, Any]) -> str:
    """The version of AWQ that a quantization_config names: the order of its weights."""
    return str(stored.get("version") or stored.get("checkpoint_format") or stored.get("format") or GEMM).lower()


def has_zero_points(stored: Mapping[str, Any]) -> bool:
    """Whether the zero points of an AWQ checkpoint are fitted, instead of in the middle of the range."""
    return bool(stored.get("zero_point", not stored.get("sym", False)))


def _stored_skips(stored: Mapping[str, Any]) -> dict[str, Any]:
    skip = tuple(stored.get("skip_modules") or ())
    return {"skip": skip, "skip_defaults": not skip and not stored.get("lm_head", False)}
