"""MLX's formats: modes, bits and groups, and their names. No torch. Source: mlx's `quantize`, version 0.32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from polyquant.plugin import PackedFormat

Mode = Literal["affine", "mxfp4", "nvfp4", "mxfp8"]
Bits = Literal[2, 3, 4, 5, 6, 8]
Group = Literal[16, 32, 64, 128]
FormatName = Literal[
    "affine2-g32", "affine2-g64", "affine2-g128", "affine3-g32", "affine3-g64", "affine3-g128", "affine4-g32",
    "affine4-g64", "affine4-g128", "affine5-g32", "affine5-g64", "affine5-g128", "affine6-g32", "affine6-g64",
    "affine6-g128", "affine8-g32", "affine8-g64", "affine8-g128", "mxfp4", "nvfp4", "mxfp8",
]  # fmt: skip
BITS: tuple[Bits, ...] = (2, 3, 4, 5, 6, 8)
GROUPS: tuple[Group, ...] = (32, 64, 128)
METAL_BITS: tuple[Bits, ...] = (2, 4, 8)
"""Of affine; and of those, what transformers' Metal kernels have."""


class Format(NamedTuple):
    """How the weights of a layer are stored."""

    mode: Mode
    bits: Bits
    group_size: Group

    @property
    def name(self) -> str:
        """As in FormatName."""
        return f"affine{self.bits}-g{self.group_size}" if self.mode == "affine" else self.mode

    @property
    def scheme(self) -> str:
        """The name without the group."""
        return f"affine{self.bits}" if self.mode == "affine" else self.mode

    @property
    def keys(self) -> dict[str, object]:
        """As config.json has it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


FLOATS: Mapping[str, Format] = {
    "mxfp4": Format("mxfp4", 4, 32), "nvfp4": Format("nvfp4", 4, 16), "mxfp8": Format("mxfp8", 8, 32),
}  # fmt: skip
"""Modes of one format only: E2M1 or E4M3, with scales in E8M0 (mx...) or E4M3 (nvfp4)."""
FORMATS: Mapping[str, Format] = {
    form.name: form
    for form in (*(Format("affine", bits, group) for bits in BITS for group in GROUPS), *FLOATS.values())
}


def packed_format(form: Format, scale_dtype: str) -> PackedFormat:
    """The layout with kernel="packed", which holds the same numbers. scale_dtype: of affine, as it is stored."""
    if form.mode == "affine":
        return PackedFormat(
            kind="affine4" if form.bits <= 4 else "int8", group_size=form.group_size, offsets="minima",
            scale_dtype=scale_dtype,  # type: ignore[arg-type]  # torch's name of a floating point
        )  # fmt: skip
    kind: Literal["codebook4", "float8"] = "codebook4" if form.bits == 4 else "float8"
    return PackedFormat(kind=kind, group_size=form.group_size, scale_dtype="bfloat16")  # which holds E8M0 and E4M3
