"""Options of the AWQ backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.plugin import BackendOptions

VERSION = "gemm"  # how weights are ordered in the words; gptqmodel has kernels for the other orders on GPUs only
PER_LAYER = ("bits", "group_size", "sym", "zero_point")  # what a rule of gptqmodel's `dynamic` may change for a layer


class AwqOptions(BackendOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Columns that calibration text activates most are scaled up before rounding, so that they lose least."""

    bits: Annotated[Literal[4], Meta(description="bits of a quantized weight")] = 4
    group_size: Annotated[
        Literal[-1, 16, 32, 64, 128, 256],
        Meta(description="weights along in_features that share one scale and zero point; -1: all of them"),
    ] = 128
    zero_point: Annotated[bool, Meta(description="zero point fitted, instead of in the middle of the range")] = True
    kernel: Annotated[
        Literal["auto", "torch_aten", "torch", "gemm", "gemm_triton", "exllama_v2", "marlin"],
        Meta(description="what multiplies; auto: torch_aten or torch on a CPU, gptqmodel's choice elsewhere"),
    ] = "auto"

    load_time: ClassVar[frozenset[str]] = frozenset({"compute_dtype", "kernel"})

    @property
    def weight_bits(self) -> float:
        return self.bits

    def native(self) -> Any:
        """gptqmodel's own AWQConfig, for the modules that `skip` does not name."""
        from polyquant_awq._library import quantize_config

        return quantize_config(self)

    def stored(self) -> dict[str, Any]:
        """The `quantization_config` of a loaded model; `skip_modules` is this package's own addition."""
        return {
            "quant_method": "awq", "bits": self.bits, "group_size": self.group_size, "zero_point": self.zero_point,
            "version": VERSION, "lm_head": not self.skip_defaults and not self.skip, "skip_modules": list(self.skip),
        }  # fmt: skip

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        """Reads what autoawq (w_bit, q_group_size, version), transformers, gptqmodel and this package write.

        Raises ValueError for an order of the weights, or a variant, that the kernels here do not read.
        """
        version = stored.get("version") or stored.get("checkpoint_format") or stored.get("format") or VERSION
        if str(version).lower() != VERSION:
            raise ValueError(f"its version is {version!r}, and {VERSION!r} is read")
        if stored.get("backend") == "llm-awq":
            raise ValueError(f"it was written by llm-awq, in an order of its own; only {VERSION!r} is read")
        if stored.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
            raise ValueError(f"it is packed in {stored['pack_dtype']}, and only int32 is read")
        if overrides := [name for name, rule in (stored.get("dynamic") or {}).items() if _differs(name, rule, stored)]:
            raise ValueError(f"it gives layers different options ({', '.join(overrides[:3])}), which is not read")
        skip = tuple(stored.get("skip_modules") or ())
        values = {
            "bits": stored.get("bits", stored.get("w_bit", 4)),
            "group_size": stored.get("group_size", stored.get("q_group_size", 128)),
            "zero_point": bool(stored.get("zero_point", not stored.get("sym", False))),
            "skip": skip,
            "skip_defaults": not skip and not stored.get("lm_head", False),
        }
        return msgspec.convert(values, cls)


def _differs(name: str, rule: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    """Whether a rule of `dynamic` gives layers other options; one that starts with '-' leaves them dense."""
    return not name.startswith("-") and any(rule.get(key, stored.get(key)) != stored.get(key) for key in PER_LAYER)
