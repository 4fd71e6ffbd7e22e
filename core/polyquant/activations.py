"""What kernels with rounded activations do to the inputs of a layer. `polyquant.plugin.activations` computes it."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Activations(NamedTuple):
    """The numbers that the inputs of a layer are rounded to: a code times the scale of its block.

    The scale of a block follows from its largest number while the model runs, unless the layer has one that a
    checkpoint brings (`PackedLinear.static_scale`).
    """

    name: str  # as people call the format
    codes: Literal["e2m1", "e4m3", "int8"]
    columns: int = 0  # of a token that share a scale; 0: all of them
    scales: Literal["float32", "e4m3", "e8m0"] = "float32"
    """e4m3: times one float32 of all tokens, by which the largest of them is 448. e8m0: powers of two."""
    exponents: Literal["floor", "even", "ceil"] = "floor"
    """Of e8m0. floor: that of the largest number, less the codes' own (OCP). even: the same of that number rounded to
    E2M1's precision (llm-compressor). ceil: the least by which no number is cut (cuBLAS, transformers)."""
    most: float = 0.0  # the largest number that is told apart; 0: whatever comes
    computed: Literal["float32", "inputs"] = "float32"
    """In float32, as kernels do, or in the dtype of the inputs, as compressed-tensors, and transformers in Gemma."""
    outer: Literal["multiplies", "divides"] = "multiplies"  # what a given scale does to those of e4m3

    def __str__(self) -> str:
        blocks = f"blocks of {self.columns}" if self.columns else "each token"
        return f"{self.name} ({self.codes}, {blocks})"


NVFP4 = Activations("nvfp4", "e2m1", 16, "e4m3")
MXFP4 = Activations("mxfp4", "e2m1", 32, "e8m0")
MXFP8 = Activations("mxfp8", "e4m3", 32, "e8m0", "ceil")
FP8 = Activations("fp8", "e4m3")
FP8_BLOCKS = Activations("fp8", "e4m3", 128)
INT8 = Activations("int8", "int8")
GEMMA = INT8._replace(name="gemma", computed="inputs")
