"""Options of the autoawq backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.plugin import BackendOptions

VERSION = "gemm"  # how weights are ordered in the words; the library multiplies the other orders on GPUs only


class AutoawqOptions(BackendOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Columns that calibration text activates most are scaled up before rounding, so that they lose least."""

    bits: Annotated[Literal[4], Meta(description="bits of a quantized weight")] = 4
    group_size: Annotated[
        Literal[-1, 16, 32, 64, 128, 256],
        Meta(description="weights along in_features that share one scale and zero point; -1: all of them"),
    ] = 128

    @property
    def weight_bits(self) -> float:
        return self.bits

    def native(self) -> dict[str, Any]:
        """The library's `quant_config`, for the modules that `skip` does not name."""
        return {
            "zero_point": True, "q_group_size": self.group_size, "w_bit": self.bits, "version": VERSION.upper(),
            "modules_to_not_convert": list(self.skip) or None,
        }  # fmt: skip

    def stored(self) -> dict[str, Any]:
        """The `quantization_config` of a loaded model; `skip_modules` is this package's own addition."""
        return {
            "quant_method": "awq", "bits": self.bits, "group_size": self.group_size, "zero_point": True,
            "version": VERSION, "lm_head": not self.skip_defaults and not self.skip, "skip_modules": list(self.skip),
        }  # fmt: skip

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        """Reads what autoawq (w_bit, q_group_size, version), transformers, gptqmodel and this package write.

        Raises ValueError for an order of the weights, or a variant, that the library does not run on every device.
        """
        version = stored.get("version") or stored.get("checkpoint_format") or stored.get("format") or VERSION
        if str(version).lower() != VERSION:
            raise ValueError(f"its version is {version!r}, and {VERSION!r} is read")
        if stored.get("backend") == "llm-awq":
            raise ValueError(f"it was written by llm-awq, in an order of its own; only {VERSION!r} is read")
        if not stored.get("zero_point", not stored.get("sym", False)):
            raise ValueError("it has no zero points (zero_point is false), and layers with them are read")
        skip = tuple(stored.get("skip_modules") or ())
        values = {
            "bits": stored.get("bits", stored.get("w_bit", 4)),
            "group_size": stored.get("group_size", stored.get("q_group_size", 128)),
            "skip": skip,
            "skip_defaults": not skip and not stored.get("lm_head", False),
        }
        return msgspec.convert(values, cls)
