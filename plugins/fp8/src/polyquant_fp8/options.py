"""Options of the FP8 backends: blocks of a matrix with a scale each, and FBGEMM's, whose blocks are rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.plugin import (
    Activations,
    ExpertsOptions,
    NumberFormat,
    WeightInfo,
    activation_formats,
    require_read,
    usual_options,
)

BLOCK = (128, 128)
Block = tuple[int, int] | None
"""(rows, columns) that share a scale, -1 columns for all of them; None for one scale a matrix."""
E4M3 = ("e4m3", "e4m3fn", "float8_e4m3fn")
EXPECTED: Mapping[str, tuple[object, ...]] = {
    "fmt": E4M3, "dequantize": (False,), "modules_to_convert": ([], ()), "expert_dtype": ("fp8", "fp4"),
}  # fmt: skip
"""Settings that are read at these values only."""
READ = {
    "quant_method", "compute_dtype", "weight_block_size", "activation_scheme", "scale_fmt", "modules_to_not_convert",
    "ignored_layers", "skip_modules", *EXPECTED,
}  # fmt: skip
READ_FBGEMM = {"quant_method", "compute_dtype", "activation_scale_ub", "modules_to_not_convert", "skip_modules"}


class Float8Options(ExpertsOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the formats have in common."""

    scale_name: ClassVar[str]
    """What a layer's scales are called in checkpoints."""

    @property
    def number_format(self) -> NumberFormat:
        return "floats"

    @property
    def weight_bits(self) -> float:
        return 8

    @property
    def block(self) -> Block:
        """What shares a scale."""
        raise NotImplementedError

    @property
    def powers_of_two(self) -> bool:
        """Whether scales are powers of two, in a byte each."""
        return False

    @property
    def static_activations(self) -> bool:
        """Whether each layer has a scale for its activations."""
        return False

    def activations_of(self, weight: WeightInfo) -> Activations:
        """As transformers' kernels: blocks of as many columns as the weight's; one scale a token where it has one."""
        if self.block is None or self.static_activations:
            return activation_formats.FP8
        return activation_formats.FP8_BLOCKS._replace(
            columns=self.block[1], scales="e8m0" if self.powers_of_two else "float32", exponents="ceil"
        )


class Fp8Options(Float8Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights in float8 e4m3; each block of a matrix has one scale to multiply with. Activations are not rounded."""

    scale_name: ClassVar[str] = "weight_scale_inv"

    block_rows: Annotated[
        int, Meta(ge=0, description="rows (out_features) of a block; 0 with block_columns 0: one scale for the matrix")
    ] = BLOCK[0]
    block_columns: Annotated[int, Meta(ge=0, description="columns (in_features) of a block")] = BLOCK[1]
    scale_fmt: Annotated[
        Literal["float", "ue8m0"], Meta(description="scales in float32, or as powers of two in a byte each")
    ] = "float"
    activation_scheme: Annotated[
        Literal["dynamic", "static"],
        Meta(description="how other runtimes are told to round activations; static comes from a checkpoint only"),
    ] = "dynamic"

    def __post_init__(self) -> None:
        if (self.block_rows == 0) != (self.block_columns == 0):
            raise ValueError("block_rows and block_columns are both 0 (one scale for a matrix), or neither")
        if self.block_rows == 0 and self.scale_fmt == "ue8m0":
            raise ValueError("scale_fmt 'ue8m0' is for blocks; one scale for a matrix is a float")

    @property
    def block(self) -> Block:
        """(rows, columns), or None for one scale a matrix."""
        return (self.block_rows, self.block_columns) if self.block_rows else None

    @property
    def scheme(self) -> str:
        return "fp8-e4m3"

    @property
    def powers_of_two(self) -> bool:
        return self.scale_fmt == "ue8m0"

    @property
    def static_activations(self) -> bool:
        return self.activation_scheme == "static"

    def to_stored(self) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint: transformers' FineGrainedFP8Config, and the compute dtype."""
        return {
            "quant_method": "fp8",
            "modules_to_not_convert": self.stored_skip,
            "modules_to_convert": None,
            "activation_scheme": self.activation_scheme,
            "weight_block_size": self.block,
            "dequantize": False,
            "scale_fmt": self.scale_fmt,
            "expert_dtype": "fp8",
            "compute_dtype": self.compute_dtype,
        }

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        require_read(stored, READ)
        for name, allowed in EXPECTED.items():
            if stored.get(name) is not None and stored[name] not in allowed:
                raise ValueError(f"its {name} is {stored[name]!r}; {' or '.join(map(repr, allowed))} is read")
        block = stored.get("weight_block_size", BLOCK)
        if block is not None and (len(block) != 2 or min(block) < 1):
            raise ValueError(f"its weight_block_size is {block!r}; two positive numbers, or null, are read")
        rows, columns = block or (0, 0)
        values: dict[str, Any] = {
            "block_rows": rows,
            "block_columns": columns,
            "scale_fmt": stored.get("scale_fmt") or "float",
            "activation_scheme": stored.get("activation_scheme") or "dynamic",
        }
        return msgspec.convert(values | _common(stored), cls)


class FbgemmOptions(Float8Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights in float8 e4m3; each row of a matrix has one scale to multiply with. Activations are not rounded."""

    scale_name: ClassVar[str] = "weight_scale"

    activation_scale_ub: Annotated[
        float, Meta(gt=0, description="greatest activation that other runtimes are told to round a token by")
    ] = 1200.0

    @property
    def block(self) -> Block:
        """A row."""
        return (1, -1)

    def activations_of(self, weight: WeightInfo) -> Activations:
        """FBGEMM's: each token, whose scale is no larger than the bound's."""
        return activation_formats.FP8._replace(most=self.activation_scale_ub)

    def to_stored(self) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint: transformers' FbgemmFp8Config, and the compute dtype."""
        return {
            "quant_method": "fbgemm_fp8",
            "activation_scale_ub": self.activation_scale_ub,
            "modules_to_not_convert": self.stored_skip,
            "compute_dtype": self.compute_dtype,
        }

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        require_read(stored, READ_FBGEMM)
        values = {"activation_scale_ub": float(stored.get("activation_scale_ub") or 1200.0)}
        return msgspec.convert(values | _common(stored), cls)


def _common(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The options that all formats have."""
    dense = stored.get("modules_to_not_convert")
    dense = stored.get("ignored_layers") if dense is None else dense
    dense = stored.get("skip_modules", dense)  # polyquant's own, where a file holds more dense than was asked for
    return usual_options(stored, dense)
