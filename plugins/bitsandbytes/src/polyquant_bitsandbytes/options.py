"""Options of the bitsandbytes backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.errors import Misfit
from polyquant.plugin import ExpertsOptions, HeldWeight, NumberFormat
from polyquant.plugin.layouts import size_held

BLOCK = 64  # weights a scale
FOUR_BIT = {"quant_type": "nf4", "double_quant": False, "quant_storage": "uint8"}
EIGHT_BIT = {"int8_threshold": 6.0}


class BitsAndBytesOptions(ExpertsOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """4 bit (QLoRA's NF4 and FP4, blocks of 64 weights) or 8 bit (LLM.int8, one scale for each output row)."""

    bits: Annotated[Literal[4, 8], Meta(description="bits of a quantized weight")] = 4
    quant_type: Annotated[
        Literal["nf4", "fp4"] | None, Meta(description="4 bit: normal float (the default) or float")
    ] = None
    double_quant: Annotated[
        bool | None, Meta(description="4 bit: quantize the block scales too, to 4.13 bits a weight")
    ] = None
    quant_storage: Annotated[
        Literal["uint8", "int8", "float16", "bfloat16", "float32"] | None,
        Meta(description="4 bit: dtype of the packed tensor; FSDP needs that of the dense weights"),
    ] = None
    int8_threshold: Annotated[
        float | None, Meta(description="8 bit: activations above it are multiplied in float16 (6.0)")
    ] = None
    fp32_offload: Annotated[
        bool, Meta(description="with offload cpu: modules that spill to the CPU stay dense there, in float32")
    ] = False

    def __post_init__(self) -> None:
        own, other = (FOUR_BIT, EIGHT_BIT) if self.bits == 4 else (EIGHT_BIT, FOUR_BIT)
        misplaced = [name for name in other if getattr(self, name) is not None]
        if misplaced:
            raise ValueError(f"{', '.join(misplaced)} does not apply to {self.bits} bit, only {', '.join(own)} do")
        if self.int8_threshold is not None and self.int8_threshold < 0:
            raise ValueError(f"int8_threshold must be 0 (no outliers) or more, got {self.int8_threshold}")
        for name, value in own.items():
            if getattr(self, name) is None:
                msgspec.structs.force_setattr(self, name, value)

    @property
    def number_format(self) -> NumberFormat:
        return "normal floats" if self.quant_type == "nf4" else "floats" if self.bits == 4 else "integers"

    @property
    def weight_bits(self) -> float:
        return self.bits

    @property
    def scheme(self) -> str:
        """nf4, fp4 or int8."""
        return self.quant_type or "int8"

    def to_stored(self) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint: the arguments of transformers' BitsAndBytesConfig."""
        common = {
            "quant_method": "bitsandbytes",
            "llm_int8_enable_fp32_cpu_offload": self.fp32_offload,
            "llm_int8_skip_modules": self.stored_skip,
        }
        if self.bits == 8:
            return {"load_in_8bit": True, "llm_int8_threshold": self.int8_threshold, **common}
        computed = {} if self.compute_dtype == "auto" else {"bnb_4bit_compute_dtype": self.compute_dtype}
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_quant_storage": self.quant_storage,
            **computed,
            **common,
        }

    @classmethod
    def holding(cls, weights: Sequence[HeldWeight]) -> dict[str, Any]:
        """NF4 and FP4 in blocks of 64, and int8 with a scale a row; their block scales are not quantized again."""
        kinds = {(weight.kind, weight.bits, weight.table) for weight in weights}
        kind, bits, table = kinds.pop()
        if kinds or kind == "floats" or (kind == "integers" and bits == 4):
            raise Misfit("bits", f"its codes are {kind} of {bits} bits, and NF4, FP4 and integers of 8 bits are held")
        if any(weight.ordered for weight in weights):
            raise Misfit("act-order", "its columns belong to groups in an order of their own, and those held follow")
        if any(weight.zero_points != "middle" for weight in weights):
            raise Misfit("zero points", "its codes of 8 bits have fitted zero points, and int8 has none")
        if bits == 8:
            size_held(weights, (-1,))
            return {"bits": 8}
        size_held(weights, (BLOCK,))
        return {"bits": 4, "quant_type": "nf4" if table[0] == -1 else "fp4"}

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        skip = stored.get("llm_int8_skip_modules")
        values: dict[str, Any] = {
            "skip": tuple(skip or ()),
            "skip_defaults": skip is None,
            "fp32_offload": stored.get("llm_int8_enable_fp32_cpu_offload", False),
        }
        if stored.get("load_in_8bit"):
            values |= {"bits": 8, "int8_threshold": stored.get("llm_int8_threshold", 6.0)}
        else:
            values |= {
                "bits": 4,
                "quant_type": stored.get("bnb_4bit_quant_type", "fp4"),
                "double_quant": stored.get("bnb_4bit_use_double_quant", False),
                "quant_storage": stored.get("bnb_4bit_quant_storage") or "uint8",
                "compute_dtype": stored.get("bnb_4bit_compute_dtype", "auto"),
            }
        return msgspec.convert(values, cls)
