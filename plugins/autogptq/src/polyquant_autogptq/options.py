"""Options of the autogptq backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.plugin import BackendOptions

FORMAT = "gptq"  # zero points are stored less one; the only one that the library knows


class AutogptqOptions(BackendOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A scale and a zero point for each group of weights, rounded so that calibration text changes least."""

    bits: Annotated[Literal[2, 3, 4, 8], Meta(description="bits of a quantized weight")] = 4
    group_size: Annotated[
        Literal[-1, 16, 32, 64, 128, 256, 512, 1024],
        Meta(description="weights along in_features that share one scale and zero point; -1: all of them"),
    ] = 128
    desc_act: Annotated[
        bool, Meta(description="columns were quantized in the order of what they matter; another kernel reads them")
    ] = False
    sym: Annotated[bool, Meta(description="zero point in the middle of the range, instead of fitted")] = True

    @property
    def weight_bits(self) -> float:
        return self.bits

    @property
    def scheme(self) -> str:
        """gptq2 to gptq8."""
        return f"gptq{self.bits}"

    def native(self) -> Any:
        """The library's own BaseQuantizeConfig."""
        from polyquant_autogptq._library import BaseQuantizeConfig

        return BaseQuantizeConfig(bits=self.bits, group_size=self.group_size, desc_act=self.desc_act, sym=self.sym)

    def stored(self) -> dict[str, Any]:
        """The `quantization_config` of a loaded model; `skip_modules` is this package's own addition."""
        return {
            "quant_method": "gptq", "bits": self.bits, "group_size": self.group_size, "desc_act": self.desc_act,
            "sym": self.sym, "lm_head": not self.skip_defaults and not self.skip, "skip_modules": list(self.skip),
        }  # fmt: skip

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        """Reads what auto-gptq, optimum, gptqmodel and this package write.

        Raises ValueError for a layout or a variant that the library does not know.
        """
        layout = str(stored.get("checkpoint_format") or stored.get("format") or FORMAT).lower()
        if layout != FORMAT:
            raise ValueError(f"its format is {layout!r}, and {FORMAT!r} is read; the backend gptq reads more")
        if stored.get("is_marlin_format"):
            raise ValueError("it is packed for Marlin, which is not read")
        if stored.get("dynamic"):
            raise ValueError("it gives layers different options (dynamic), which the backend gptq knows")
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
