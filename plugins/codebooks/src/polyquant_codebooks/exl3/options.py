"""Options of EXL3 checkpoints. Format: exllamav3's LinearEXL3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

import msgspec
from msgspec import Meta

from polyquant_codebooks.options import CodebookOptions, Layout, common, require_known

TILE, BLOCK = 16, 128
"""Rows and columns of a tile of codes, and of a block that is rotated."""
NO_MATTER = ("version", "calibration", "out_scales", "codebook", "tensor_storage")
"""Settings that say how it was made, or what the tensors say themselves."""


class Exl3Options(CodebookOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights, rotated on both sides, are states of a trellis, whose values a hash gives. Checkpoints only."""

    mark: ClassVar[str] = "trellis"

    bits: Annotated[float, Meta(ge=1, le=8, description="bits of a weight, on average")] = 4
    head_bits: Annotated[int, Meta(ge=1, le=8, description="of the output head")] = 6
    module_bits: Annotated[
        tuple[tuple[str, int], ...],
        Meta(description="bits of single modules, which a checkpoint's tensors tell"),
    ] = ()

    @property
    def weight_bits(self) -> float:
        return round(self.bits)

    @property
    def scheme(self) -> str:
        """exl3."""
        return "exl3"

    def bits_of(self, name: str) -> float:
        known = dict(self.module_bits)
        return known.get(name, self.head_bits if name == "lm_head" else round(self.bits))

    def layout(self, name: str, shape: Sequence[int]) -> Layout:
        rows, columns = shape
        if rows % BLOCK or columns % BLOCK:
            raise ValueError(f"EXL3 rotates blocks of {BLOCK} rows and {BLOCK} columns, which do not divide it")
        bits = int(self.bits_of(name))
        return {
            "trellis": ((columns // TILE, rows // TILE, TILE * bits), "int16"),
            "suh": ((columns,), "float16"), "svh": ((rows,), "float16"),
        }  # fmt: skip

    def to_stored(self) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint: exllamav3's, and what polyquant adds."""
        return {
            "quant_method": "exl3", "bits": self.bits, "head_bits": self.head_bits,
            "module_bits": dict(self.module_bits), "skip_modules": self.stored_skip,
            "compute_dtype": self.compute_dtype,
        }  # fmt: skip

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        """A head is quantized too, where its tensors say so."""
        require_known(stored, "bits", "head_bits", "module_bits", *NO_MATTER)
        values = {name: stored[name] for name in ("bits", "head_bits") if stored.get(name) is not None}
        modules = sorted((stored.get("module_bits") or {}).items())
        return msgspec.convert(values | {"module_bits": modules} | common(stored), cls)
