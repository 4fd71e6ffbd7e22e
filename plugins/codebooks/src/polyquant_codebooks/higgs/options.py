"""Options of HIGGS. Format: transformers.integrations.higgs and FLUTE's packing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from msgspec import Meta
from msgspec.structs import replace
from polyquant.plugin import RoundingMethod

from polyquant_codebooks.options import CodebookOptions, Layout, common, require_known

WIDE = {
    2: {*range(4), *range(12, 16), *range(24, 28)}, 3: {*range(4), *range(12, 16), *range(24, 28)},
    4: {*range(16), *range(48, 64), *range(96, 112)},
}  # fmt: skip
"""Bits -> the templates of FLUTE's kernels that take columns in tiles of 64; the others', of 32."""
MOST_TEMPLATES = {2: 36, 3: 36, 4: 144}
"""Bits -> how many templates there are."""
OWN = {2: 4, 3: 4, 4: 16}
"""Bits -> the template by which what is quantized here is ordered, of tiles of 32."""


class HiggsOptions(CodebookOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rows are rotated by Hadamard matrices, scaled, and rounded to a grid that is best for normal numbers."""

    mark: ClassVar[str] = "tables2"

    bits: Annotated[Literal[2, 3, 4], Meta(description="bits of a weight")] = 4
    p: Annotated[Literal[1, 2], Meta(description="weights that are rounded together, to a point of a grid")] = 2
    group_size: Annotated[Literal[64, 128, 256], Meta(description="weights of a row that a stored scale is for")] = 256
    hadamard_size: Annotated[
        Literal[64, 128, 256, 512, 1024, 2048, 4096],
        Meta(description="columns that are rotated together; rows are filled up to whole ones"),
    ] = 512
    templates: Annotated[
        tuple[tuple[str, int], ...],
        Meta(description="template of FLUTE's kernels that each layer is ordered for; a checkpoint brings them"),
    ] = ()

    def __post_init__(self) -> None:
        if self.hadamard_size % self.group_size:
            raise ValueError(f"hadamard_size {self.hadamard_size} is no multiple of group_size {self.group_size}")

    @property
    def rounding_method(self) -> RoundingMethod:
        return "nearest"

    @property
    def weight_bits(self) -> float:
        return self.bits

    @property
    def scheme(self) -> str:
        """higgs2, higgs3 or higgs4."""
        return f"higgs{self.bits}"

    def with_templates(self, names: Sequence[str]) -> HiggsOptions:
        """The same for modules of these names, which are quantized here."""
        return replace(self, templates=tuple((name, OWN[self.bits]) for name in sorted(names)))

    def tile_of(self, name: str) -> int:
        """Columns of a tile of the module of that name. Raises ValueError where the checkpoint does not say."""
        if not self.templates:
            return 32  # a dense model, which is still to be quantized
        template = dict(self.templates).get(name)
        if template is None:
            raise ValueError("its quantization_config has no template_id for this layer (tune_metadata)")
        if not 0 <= template < MOST_TEMPLATES[self.bits]:
            raise ValueError(
                f"its template_id is {template}, and of {self.bits} bits there are {MOST_TEMPLATES[self.bits]}"
            )
        tile = 64 if template in WIDE[self.bits] else 32
        if self.bits == 3 and tile == 64:
            raise ValueError(f"its template_id {template} has tiles of 64, and of 3 bits only those of 32 are packed")
        return tile

    def layout(self, name: str, shape: Sequence[int]) -> Layout:
        rows, columns = shape
        tile = self.tile_of(name)
        whole = 512 if self.bits == 3 else tile * 16 // self.bits
        if rows % whole:
            raise ValueError(f"HIGGS with {self.bits} bits packs tiles of {whole} rows, which do not divide its {rows}")
        filled = self.hadamard_size * ceil(columns / self.hadamard_size)
        entries = 2**self.bits
        return {
            "weight": ((rows * self.bits // 16, filled), "int16"),
            "scales": ((rows, filled // self.group_size), "float16"),
            "tables": ((entries,), "float16"), "tables2": ((entries, entries, 2), "float16"),
        }  # fmt: skip

    def to_stored(self) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint: transformers' HiggsConfig, and the compute dtype."""
        return {
            "quant_method": "higgs", "bits": self.bits, "p": self.p, "group_size": self.group_size,
            "hadamard_size": self.hadamard_size,
            "tune_metadata": {name: {"num_bits": self.bits, "template_id": each} for name, each in self.templates},
            "modules_to_not_convert": self.stored_skip, "compute_dtype": self.compute_dtype,
        }  # fmt: skip

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        own = ("bits", "p", "group_size", "hadamard_size")
        require_known(stored, *own, "tune_metadata")
        values: dict[str, Any] = {name: stored[name] for name in own if stored.get(name) is not None}
        tuned = stored.get("tune_metadata") or {}
        if not tuned:
            raise ValueError("it has no tune_metadata, without which it is not known how weights are ordered")
        bits = values.get("bits", 4)
        for name, each in tuned.items():
            if each.get("num_bits", bits) != bits:
                raise ValueError(f"num_bits of {name} is {each['num_bits']}, and bits is {bits}")
            if type(each.get("template_id")) is not int:
                raise ValueError(
                    f"{name} has no template_id, without which it is not known how its weights are ordered"
                )
        values["templates"] = sorted((name, each["template_id"]) for name, each in tuned.items())
        return msgspec.convert(values | common(stored), cls)
