"""Options of SpQR checkpoints. Format: spqr_quant's QuantizedLinear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from msgspec import Meta

from polyquant_codebooks.options import CodebookOptions, Layout, common, require_known

TILE = 16
"""Rows and columns of a tile."""
PARTS = ("dense_weights", "row_offsets", "col_vals", "in_perm")


class SpqrOptions(CodebookOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Three bits a weight, whose scales and zero points have three bits too, and outliers. Checkpoints only."""

    mark: ClassVar[str] = "dense_weights"

    bits: Annotated[Literal[3], Meta(description="bits of a weight, a scale and a zero point; the format has 3")] = 3
    beta1: Annotated[Literal[16], Meta(description="columns of a tile")] = TILE
    beta2: Annotated[Literal[16], Meta(description="rows of a tile")] = TILE
    shapes: Annotated[
        tuple[tuple[str, int], ...],
        Meta(description="length of each tensor, by its name and '.shape': a checkpoint brings them"),
    ] = ()

    @property
    def weight_bits(self) -> float:
        return self.bits

    @property
    def scheme(self) -> str:
        """spqr3."""
        return "spqr3"

    def layout(self, name: str, shape: Sequence[int]) -> Layout:
        (rows, columns), lengths = shape, dict(self.shapes)
        if rows % TILE or columns % TILE:
            raise ValueError(f"SpQR has tiles of {TILE} rows and {TILE} columns, which do not divide it")
        missing = [part for part in PARTS if f"{name}.{part}.shape" not in lengths]
        if missing:
            raise ValueError(f"its quantization_config has no shapes for {', '.join(missing)}")
        length = {part: lengths[f"{name}.{part}.shape"] for part in PARTS}
        expected = {
            "dense_weights": (rows * columns // TILE,), "row_offsets": (rows + 1, rows // TILE + 1),
            "in_perm": (0, columns // 2),
        }  # fmt: skip
        for part, allowed in expected.items():
            if length[part] not in allowed:
                raise ValueError(f"{part} has {length[part]} numbers, and {' or '.join(map(str, allowed))} is possible")
        return {
            "dense_weights": ((length["dense_weights"],), "int64"),
            **{part: ((length[part],), "int32") for part in PARTS[1:]},
        }

    def to_stored(self) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint: transformers' SpQRConfig, and the compute dtype."""
        return {
            "quant_method": "spqr", "bits": self.bits, "beta1": self.beta1, "beta2": self.beta2,
            "shapes": dict(self.shapes), "modules_to_not_convert": self.stored_skip,
            "compute_dtype": self.compute_dtype,
        }  # fmt: skip

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        require_known(stored, "bits", "beta1", "beta2", "shapes")
        lengths = {name: value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
                   for name, value in (stored.get("shapes") or {}).items()}  # fmt: skip
        values = {name: stored[name] for name in ("bits", "beta1", "beta2") if stored.get(name) is not None}
        return msgspec.convert(values | {"shapes": sorted(lengths.items())} | common(stored), cls)
