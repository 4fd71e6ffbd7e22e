"""Options of the compressed-tensors backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.errors import ConfigError
from polyquant.plugin import BackendOptions

from polyquant_compressed_tensors.stored import read_stored

Weights = Literal["int4", "int8", "fp8", "mxfp4", "nvfp4"]
Strategy = Literal["tensor", "channel", "group", "block", "tensor_group"]
BITS: Mapping[Weights, int] = {"int4": 4, "int8": 8, "fp8": 8, "mxfp4": 4, "nvfp4": 4}
STRATEGIES: Mapping[Weights, tuple[Strategy, ...]] = {  # the first is the default
    "int4": ("group", "channel"),
    "int8": ("channel", "group"),
    "fp8": ("channel", "block", "tensor"),
    "mxfp4": ("group",),
    "nvfp4": ("tensor_group",),
}
FIXED_GROUPS: Mapping[Weights, int] = {"mxfp4": 32, "nvfp4": 16}
DEFAULT_GROUP, BLOCK = 64, (128, 128)
PACK_GROUPS = (32, 64, 128, 256)  # that torch's int4 matmul has
SAMPLES, LENGTH = 64, 512


class CompressedTensorsOptions(BackendOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which of llm-compressor's schemes, and how its weights are rounded."""

    weights: Annotated[
        Weights,
        Meta(description="type of a quantized weight: W4A16, W8A16 or W8A8, FP8, MXFP4A16, NVFP4A16 of llm-compressor"),
    ] = "int4"
    strategy: Annotated[
        Strategy | None,
        Meta(description="which weights share a scale (int4: group; int8, fp8: channel, a row of the weight)"),
    ] = None
    group_size: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="strategy group: weights that share a scale, along in_features (64; mxfp4 32, nvfp4 16)"),
    ] = None
    symmetric: Annotated[bool, Meta(description="integers: without a zero point")] = True
    dynamic_activations: Annotated[
        bool, Meta(description="int8, fp8: round activations to the same type too, token by token while running")
    ] = False
    kernel: Annotated[
        Literal["auto", "pack_mm", "decode"],
        Meta(
            description="pack_mm: torch's matmuls for packed int4 and int8 weights, on CPUs in bfloat16, the choice of "
            "auto there; decode: unpack a layer's weight each time it is used"
        ),
    ] = "auto"
    method: Annotated[
        Literal["rtn", "gptq", "unknown"],
        Meta(description="how weights are rounded: to nearest, or by GPTQ; unknown: the checkpoint does not say"),
    ] = "rtn"
    samples: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description=f"gptq: windows of calibration text ({SAMPLES})")
    ] = None
    length: Annotated[
        Annotated[int, Meta(ge=8)] | None, Meta(description=f"gptq: tokens of a window of text ({LENGTH})")
    ] = None

    load_time: ClassVar[frozenset[str]] = frozenset({"compute_dtype", "kernel"})

    def __post_init__(self) -> None:
        allowed = STRATEGIES[self.weights]
        strategy: Strategy = self.strategy or ("group" if self.group_size and "group" in allowed else allowed[0])
        if strategy not in allowed:
            raise ValueError(f"strategy {strategy!r} does not go with {self.weights}; use {', '.join(allowed)}")
        fixed = FIXED_GROUPS.get(self.weights)
        grouped = strategy in ("group", "tensor_group")
        if self.group_size is not None and (not grouped or fixed not in (None, self.group_size)):
            has = f"has groups of {fixed}" if fixed else f"with strategy {strategy!r} has no groups"
            raise ValueError(f"group_size {self.group_size} does not apply: {self.weights} {has}")
        if not self.symmetric and not self.weights.startswith("int"):
            raise ValueError(f"symmetric=False applies to int4 and int8 only; {self.weights} has no zero point")
        if self.dynamic_activations and (self.weights not in ("int8", "fp8") or not self.symmetric or grouped):
            raise ValueError("dynamic_activations applies to symmetric int8 and fp8 without groups only")
        for name in ("samples", "length"):
            if getattr(self, name) is not None and self.method != "gptq":
                raise ValueError(f"{name} applies to method='gptq' only; {self.method!r} uses no calibration text")
        if self.method == "gptq" and not self.weights.startswith("int"):
            raise ValueError(f"method 'gptq' applies to int4 and int8 only, not to {self.weights!r}")
        settled: dict[str, object] = {"strategy": strategy}
        if grouped:
            settled["group_size"] = self.group_size or fixed or DEFAULT_GROUP
        if self.method == "gptq":
            settled |= {"samples": self.samples or SAMPLES, "length": self.length or LENGTH}
        for name, value in settled.items():
            msgspec.structs.force_setattr(self, name, value)

    @property
    def weight_bits(self) -> float:
        return BITS[self.weights]

    @property
    def scheme(self) -> str:
        """The type of the weights, with -dynamic where activations are rounded too."""
        return f"{self.weights}-dynamic" if self.dynamic_activations else self.weights

    @property
    def packed_format(self) -> str:
        """What llm-compressor calls the layout that it writes for these options."""
        if self.weights in FIXED_GROUPS:
            return f"{self.weights}-pack-quantized"
        if self.weights == "fp8":
            return "float-quantized" if self.dynamic_activations else "naive-quantized"
        return "int-quantized" if self.dynamic_activations else "pack-quantized"

    def with_kernel(self, device: str, compute_dtype: str) -> Self:
        """These options with the kernel settled. Raises ConfigError where torch has none that was asked for."""
        fits = self.symmetric and (
            (self.weights == "int4" and self.group_size in PACK_GROUPS)
            or (self.weights == "int8" and self.strategy == "channel" and not self.dynamic_activations)
        )
        there = fits and device == "cpu" and compute_dtype == "bfloat16"
        if self.kernel == "pack_mm" and not there:
            raise ConfigError(
                "kernel='pack_mm' is for the CPU in bfloat16, symmetric int4 in groups of 32, 64, 128 or 256 and int8 "
                f"with a scale a row; here it is {self.scheme} in {compute_dtype} on {device}: use kernel='decode'"
            )
        chosen = self.kernel if self.kernel != "auto" else "pack_mm" if there else "decode"
        return msgspec.structs.replace(self, kernel=chosen)

    def native(self) -> Any:
        """compressed-tensors' own QuantizationScheme."""
        from polyquant_compressed_tensors.native import scheme

        return scheme(self)

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        return msgspec.convert(read_stored(stored), cls)
