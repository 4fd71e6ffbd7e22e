"""Options of the AQLM backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.plugin import BackendOptions, NumberFormat, RoundingMethod, require_read

DEFAULTS: Mapping[str, int] = {"num_codebooks": 1, "nbits_per_codebook": 16, "in_group_size": 8, "out_group_size": 1}
"""What a checkpoint means that does not say."""
DENSE = "linear_weights_not_to_quantize"
READ = {"quant_method", "compute_dtype", DENSE, *DEFAULTS}


class AqlmOptions(BackendOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A group of weights is the sum of one vector from each codebook, times the scale of its output row."""

    num_codebooks: Annotated[int, Meta(ge=1, le=32, description="codebooks whose vectors are added")] = 2
    nbits_per_codebook: Annotated[
        int, Meta(ge=1, le=16, description="bits of a code; a codebook holds 2 to this power vectors")
    ] = 8
    in_group_size: Annotated[int, Meta(ge=1, description="weights of a vector along in_features")] = 8
    out_group_size: Annotated[int, Meta(ge=1, description="weights of a vector along out_features")] = 1
    kernel: Annotated[
        Literal["auto", "lookup", "dequantize"],
        Meta(
            description="lookup: table of products for few tokens, numba, CPU in float32 with 8-bit codes; "
            "dequantize: the layer in each pass, anywhere; auto: lookup where it runs"
        ),
    ] = "auto"

    load_time: ClassVar[frozenset[str]] = frozenset({"compute_dtype", "kernel"})

    def __post_init__(self) -> None:
        if not 0.5 <= self.code_bits <= 8.5:
            raise ValueError(
                f"num_codebooks * nbits_per_codebook / group size is {self.code_bits:g} bits a weight; "
                "0.5 to 8.5 are read"
            )
        if self.kernel == "lookup" and (self.nbits_per_codebook, self.out_group_size) != (8, 1):
            raise ValueError(
                "kernel 'lookup' is for 8-bit codes and out_group_size 1; this has "
                f"{self.nbits_per_codebook} and {self.out_group_size}, use kernel='dequantize'"
            )

    @property
    def rounding_method(self) -> RoundingMethod:
        return "codebook"

    @property
    def code_bits(self) -> float:
        """Bits of codes for each weight, without codebooks and scales."""
        return self.num_codebooks * self.nbits_per_codebook / (self.in_group_size * self.out_group_size)

    @property
    def number_format(self) -> NumberFormat:
        return "vectors"

    @property
    def weight_bits(self) -> float:
        """`code_bits` to the nearest whole number, at least 1."""
        return max(1, round(self.code_bits))

    def to_stored(self) -> dict[str, Any]:
        """As transformers writes it; `compute_dtype` is polyquant's addition.

        Dense modules stand there with and without .weight: transformers 5 heeds only the latter.
        """
        dense = [name + suffix for name in self.skip for suffix in (".weight", "")]
        sizes = {name: getattr(self, name) for name in DEFAULTS}
        return {"quant_method": "aqlm", **sizes, DENSE: dense, "compute_dtype": self.compute_dtype}

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        require_read(stored, READ)
        values = {name: stored.get(name, default) for name, default in DEFAULTS.items()}
        dense = tuple(dict.fromkeys(name.removesuffix(".weight") for name in stored.get(DENSE) or ()))
        values |= {"compute_dtype": stored.get("compute_dtype", "auto"), "skip": dense, "skip_defaults": False}
        return msgspec.convert(values, cls)
