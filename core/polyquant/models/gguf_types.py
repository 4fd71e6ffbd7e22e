"""The block types of GGUF. Numbers and sizes: `enum ggml_type` and the block structs of ggml (ggml-common.h)."""

from __future__ import annotations

from typing import NamedTuple

from polyquant.options import NumberFormat


class BlockType(NamedTuple):
    """How a run of weights lies in the file."""

    id: int  # ggml's
    name: str
    elements: int  # weights a block
    nbytes: int  # bytes a block
    bits: float  # nominal, of a weight
    format: NumberFormat = "integers"

    @property
    def packed(self) -> bool:
        """Whether it holds blocks; F32, F16 and BF16 hold plain numbers."""
        return self.elements > 1

    def row_bytes(self, in_features: int) -> int:
        """Bytes of one row; `in_features` must be whole blocks."""
        return in_features // self.elements * self.nbytes


TYPES = {
    block.name: block
    for block in (
        BlockType(0, "F32", 1, 4, 32, "floats"),
        BlockType(1, "F16", 1, 2, 16, "floats"),
        BlockType(30, "BF16", 1, 2, 16, "floats"),
        BlockType(2, "Q4_0", 32, 18, 4),
        BlockType(3, "Q4_1", 32, 20, 4, "integers with zero points"),
        BlockType(6, "Q5_0", 32, 22, 5),
        BlockType(7, "Q5_1", 32, 24, 5, "integers with zero points"),
        BlockType(8, "Q8_0", 32, 34, 8),
        BlockType(10, "Q2_K", 256, 84, 2, "k-quants"),
        BlockType(11, "Q3_K", 256, 110, 3, "k-quants"),
        BlockType(12, "Q4_K", 256, 144, 4, "k-quants"),
        BlockType(13, "Q5_K", 256, 176, 5, "k-quants"),
        BlockType(14, "Q6_K", 256, 210, 6, "k-quants"),
        BlockType(16, "IQ2_XXS", 256, 66, 2, "vectors"),
        BlockType(17, "IQ2_XS", 256, 74, 2, "vectors"),
        BlockType(22, "IQ2_S", 256, 82, 2, "vectors"),
        BlockType(18, "IQ3_XXS", 256, 98, 3, "vectors"),
        BlockType(21, "IQ3_S", 256, 110, 3, "vectors"),
        BlockType(19, "IQ1_S", 256, 50, 1, "vectors"),
        BlockType(29, "IQ1_M", 256, 56, 1, "vectors"),
        BlockType(20, "IQ4_NL", 32, 18, 4, "normal floats"),
        BlockType(23, "IQ4_XS", 256, 136, 4, "normal floats"),
        BlockType(34, "TQ1_0", 256, 54, 1.6),
        BlockType(35, "TQ2_0", 256, 66, 2),
        BlockType(39, "MXFP4", 32, 17, 4, "floats"),
        BlockType(40, "NVFP4", 64, 36, 4, "floats"),
    )
}
BY_ID = {block.id: block for block in TYPES.values()}
FLOAT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # torch's names
