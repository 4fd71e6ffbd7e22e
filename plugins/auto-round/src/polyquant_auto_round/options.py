"""Options of the AutoRound backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.plugin import NumberFormat, PackableOptions, RoundingMethod

Packing = Literal["plain", "gptq", "awq"]
"""plain: gptq with zero points that are not stored less one."""
METHODS = {"auto_round": "auto-round", "auto_gptq": "gptq", "auto_awq": "awq"}  # format -> quant_method
SAMPLES, SAMPLE_TOKENS = 32, 256
LIBRARY_ITERS, LIBRARY_SAMPLES, LIBRARY_TOKENS = 200, 128, 2048  # auto-round's defaults, which it does not store
UNREAD = ("act_bits", "rotation_config", "spinquant_config", "static_kv_dtype", "static_attention_dtype")


class AutoRoundOptions(PackableOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A scale for each group of weights; which way each weight is rounded is tuned, block by block, or left plain."""

    bits: Annotated[Literal[2, 3, 4, 8], Meta(description="bits of a quantized weight; 3 has no fast kernel")] = 4
    group_size: Annotated[
        Literal[-1, 32, 64, 128, 256, 512, 1024],
        Meta(description="weights along in_features that share one scale; -1: all of them"),
    ] = 64
    sym: Annotated[bool, Meta(description="zero point in the middle of the range, instead of fitted")] = True
    iters: Annotated[
        int,
        Meta(ge=0, description="tuning steps a block, with calibration text (auto-round itself takes 200); 0: none"),
    ] = 0
    samples: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="windows of calibration text, at most, if iters > 0 (32)")
    ] = None
    sample_tokens: Annotated[
        Annotated[int, Meta(ge=32)] | None, Meta(description="tokens of a calibration window, if iters > 0 (256)")
    ] = None
    format: Annotated[
        Literal["auto_round", "auto_gptq", "auto_awq"],
        Meta(description="checkpoint to write: auto-round's own, or one that GPTQ or AWQ backends read too"),
    ] = "auto_round"

    def __post_init__(self) -> None:
        if self.bits == 8 and not self.sym:
            raise ValueError("auto-round has no 8-bit weights with fitted zero points: leave sym at True")
        if self.format == "auto_awq" and self.bits != 4:
            raise ValueError(f"format='auto_awq' holds 4 bits, not {self.bits}; use format='auto_round'")
        given = [name for name in ("samples", "sample_tokens") if getattr(self, name) is not None]
        if given and not self.iters:
            raise ValueError(f"{' and '.join(given)} need iters above 0: nothing is tuned without")
        if self.iters:
            for name, value in (("samples", SAMPLES), ("sample_tokens", SAMPLE_TOKENS)):
                if getattr(self, name) is None:
                    msgspec.structs.force_setattr(self, name, value)

    @property
    def rounding_method(self) -> RoundingMethod:
        return "tuned" if self.iters else "nearest"

    @property
    def number_format(self) -> NumberFormat:
        return "integers" if self.sym else "integers with zero points"

    @property
    def weight_bits(self) -> float:
        return self.bits

    @property
    def scheme(self) -> str:
        """int4 or, with fitted zero points, uint4; the same for 2, 3 and 8 bits."""
        return f"int{self.bits}" if self.sym else f"uint{self.bits}"

    def to_stored(self) -> dict[str, Any]:
        """What this package adds to a checkpoint's `quantization_config`, and all that a loaded model's holds."""
        tuning: dict[str, Any] = {"iters": self.iters}
        if self.iters:
            tuning |= {"nsamples": self.samples, "seqlen": self.sample_tokens}
        return {
            "quant_method": METHODS[self.format], "bits": self.bits, "group_size": self.group_size, "sym": self.sym,
            "skip_modules": list(self.skip), "skip_defaults": self.skip_defaults, **tuning,
        }  # fmt: skip

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        """Reads what auto-round and this package write, and other tools' GPTQ and AWQ checkpoints of plain order.

        Raises ValueError for a layout or a variant that the kernels here do not read.
        """
        packing(stored)
        if unread := [name for name in UNREAD if stored.get(name) and stored[name] != 16]:
            raise ValueError(f"it uses {', '.join(unread)}, which is not read")
        if (data_type := stored.get("data_type", "int")) != "int":
            raise ValueError(f"its weights are {data_type}, and int is read")
        if stored.get("desc_act"):
            raise ValueError("its columns are reordered (desc_act), which auto-round does not read; use backend='gptq'")
        iters = stored.get("iters", 0 if stored.get("enable_quanted_input") is False else LIBRARY_ITERS)
        skip = tuple(stored.get("skip_modules") or ())
        values = {
            "bits": stored.get("bits", stored.get("w_bit")),
            "group_size": stored.get("group_size", stored.get("q_group_size")),
            "sym": stored.get("sym", not stored.get("zero_point", False)),
            "iters": iters,
            "samples": stored.get("nsamples", LIBRARY_SAMPLES) if iters else None,
            "sample_tokens": stored.get("seqlen", LIBRARY_TOKENS) if iters else None,
            "format": next(name for name, method in METHODS.items() if method == stored["quant_method"]),
            "skip": skip,
            "skip_defaults": stored.get("skip_defaults", not skip),
        }
        return msgspec.convert(values, cls)


def packing(stored: Mapping[str, Any]) -> Packing:
    """How a checkpoint packs its weights.

    Raises ValueError for another layout.
    """
    method, layout = stored["quant_method"], str(stored.get("packing_format", "auto_round:auto_gptq"))
    if method == "awq":
        layout = f"auto_round:{stored.get('version', 'gemm')}".lower().replace(":gemm", ":auto_awq")
    elif method == "gptq":
        layout = f"auto_round:{stored.get('checkpoint_format') or 'gptq'}".replace(":gptq_v2", ":gptqmodel")
    known: dict[str, Packing] = {
        "auto_round": "plain", "auto_round:gptqmodel": "plain", "auto_round:exllamav2": "plain",
        "auto_round:tritonv2": "plain", "auto_round:auto_gptq": "gptq", "auto_round:gptq": "gptq",
        "auto_round:auto_gptq:exllamav2": "gptq", "auto_round:gptq:exllamav2": "gptq", "auto_round:auto_awq": "awq",
        "auto_round:awq": "awq",
    }  # fmt: skip
    if layout not in known:
        raise ValueError(f"its layout is {layout.removeprefix('auto_round:')!r}, which is not read")
    return known[layout]
