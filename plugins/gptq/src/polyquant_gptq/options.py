"""Options of the GPTQ backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.plugin import BackendOptions

FORMATS = ("gptq", "gptq_v2")  # zero points are stored less one in the first
PER_LAYER = ("bits", "group_size", "sym", "desc_act")  # what a rule of gptqmodel's `dynamic` may change for a layer
UNREAD = ("activation", "adapter", "rotation", "is_marlin_format")


class GptqOptions(BackendOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A scale and a zero point for each group of weights, rounded so that calibration text changes least."""

    bits: Annotated[Literal[2, 3, 4, 8], Meta(description="bits of a quantized weight")] = 4
    group_size: Annotated[
        Literal[-1, 16, 32, 64, 128, 256, 512, 1024],
        Meta(description="weights along in_features that share one scale and zero point; -1: all of them"),
    ] = 128
    desc_act: Annotated[
        bool, Meta(description="quantize the columns that matter most first; a little closer, a little slower")
    ] = False
    sym: Annotated[bool, Meta(description="zero point in the middle of the range, instead of fitted")] = True
    kernel: Annotated[
        Literal["auto", "torch_aten", "torch", "triton", "exllama_v2", "marlin"],
        Meta(description="what multiplies; auto: torch_aten or torch on a CPU, gptqmodel's choice elsewhere"),
    ] = "auto"

    load_time: ClassVar[frozenset[str]] = frozenset({"compute_dtype", "kernel"})

    @property
    def weight_bits(self) -> float:
        return self.bits

    @property
    def scheme(self) -> str:
        """gptq2 to gptq8."""
        return f"gptq{self.bits}"

    @property
    def stored_format(self) -> str:
        """The checkpoint format that is written: with fitted zero points, the one that can hold all of them."""
        return "gptq" if self.sym else "gptq_v2"

    def native(self) -> Any:
        """gptqmodel's own QuantizeConfig, for the modules that `skip` does not name."""
        from polyquant_gptq._library import quantize_config

        return quantize_config(self)

    def stored(self) -> dict[str, Any]:
        """The `quantization_config` of a loaded model; `skip_modules` is this package's own addition."""
        return {
            "quant_method": "gptq", "bits": self.bits, "group_size": self.group_size, "desc_act": self.desc_act,
            "sym": self.sym, "lm_head": not self.skip_defaults and not self.skip, "skip_modules": list(self.skip),
        }  # fmt: skip

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        """Reads what gptqmodel, auto-gptq, optimum and this package write.

        Raises ValueError for a layout or a variant that the kernels here do not read.
        """
        if (layout := stored_format(stored)) not in FORMATS:
            raise ValueError(f"its format is {layout!r}, and {' and '.join(FORMATS)} are read")
        if unread := [name for name in UNREAD if stored.get(name)]:
            raise ValueError(f"it uses {', '.join(unread)}, which is not read")
        if stored.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
            raise ValueError(f"it is packed in {stored['pack_dtype']}, and only int32 is read")
        if overrides := [name for name, rule in (stored.get("dynamic") or {}).items() if _differs(name, rule, stored)]:
            raise ValueError(f"it gives layers different options ({', '.join(overrides[:3])}), which is not read")
        skip = tuple(stored.get("skip_modules") or ())
        values = {
            "bits": stored.get("bits", stored.get("wbits")),
            "group_size": stored.get("group_size", stored.get("groupsize", -1)),
            "desc_act": bool(stored.get("desc_act", False)),
            "sym": bool(stored.get("sym", True)),
            "skip": skip,
            "skip_defaults": not skip and not stored.get("lm_head", False),
        }
        return msgspec.convert(values, cls)


def stored_format(stored: Mapping[str, Any]) -> str:
    """The checkpoint format that a quantization_config names; auto-gptq names none."""
    return str(stored.get("checkpoint_format") or stored.get("format") or "gptq").lower()


def _differs(name: str, rule: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    """Whether a rule of `dynamic` gives layers other options; one that starts with '-' leaves them dense."""
    return not name.startswith("-") and any(rule.get(key, stored.get(key)) != stored.get(key) for key in PER_LAYER)
