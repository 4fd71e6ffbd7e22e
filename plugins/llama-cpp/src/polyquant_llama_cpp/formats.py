"""What a GGUF as a whole is called, such as Q4_K_M: `enum llama_ftype` of llama.h, kept in general.file_type."""

from __future__ import annotations

from typing import Literal, get_args

from polyquant.plugin.gguf import TYPES

Quantizable = Literal[
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S",
    "Q5_K_M", "Q6_K", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0",
]  # fmt: skip
"""What llama.cpp quantizes to without an importance matrix."""
ReadOnly = Literal[
    "F32", "F16", "BF16", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S",
    "MXFP4_MOE", "NVFP4",
]  # fmt: skip
IDS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12,
    "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20,
    "Q2_K_S": 21, "IQ3_XS": 22, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28,
    "IQ2_M": 29, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4_MOE": 38, "NVFP4": 39,
}  # fmt: skip
QUANTIZABLE: tuple[str, ...] = get_args(Quantizable)
FULL_PRECISION = ("F32", "F16", "BF16")
SOURCES = (*FULL_PRECISION, "Q8_0")  # block types whose own loss is small enough to quantize from


def name_of(file_type: object) -> str:
    """The name for a value of general.file_type; 'file' where it is none that is known."""
    return next((name for name, number in IDS.items() if number == file_type), "file")


def scheme_of(name: str) -> str:
    """The block type that most weights of such a file have; empty where its name does not say, as for IQ3_M."""
    return next((each for each in (name, name.rpartition("_")[0]) if each in TYPES and TYPES[each].packed), "")


def bits_of(name: str) -> float:
    """Nominal bits of a weight: of its block type, else the number in the name; 0 for 'file'."""
    if scheme := scheme_of(name):
        return TYPES[scheme].bits
    digits = name.lstrip("BFINMXPQT")
    return float(digits.partition("_")[0]) if digits[:1].isdigit() else 0.0
