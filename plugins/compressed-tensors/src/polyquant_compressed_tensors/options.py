"""Options of the compressed-tensors backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.errors import ConfigError
from polyquant.plugin import (
    Activations,
    HeldWeight,
    LayerFormats,
    MixableOptions,
    NumberFormat,
    PackableOptions,
    RoundingMethod,
    WeightInfo,
    module_of,
)

from polyquant_compressed_tensors.arguments import (
    BITS,
    FIXED_GROUPS,
    Weights,
    activations_beside,
    ways,
    weight_arguments,
)
from polyquant_compressed_tensors.formats import (
    CHOICES,
    FP4,
    LINEAR,
    OWN_FIELDS,
    STRATEGIES,
    LayerFormat,
    Strategy,
    choices_of,
    first_fitting,
    held_formats,
    is_ignored,
    read_stored,
    settled,
    targeted,
)

PACK_GROUPS = (32, 64, 128, 256)  # that torch's int4 matmul has
SAMPLES, LENGTH = 64, 512
READ_ONLY = "sparse checkpoints (weights='sparse') are read and saved here, and not made of a dense model"
OWN_CHOICE = ("auto", "library")  # kernel options that leave the choice to this package


class CompressedTensorsOptions(MixableOptions, PackableOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which of llm-compressor's schemes, and how its weights are rounded."""

    weights: Annotated[
        Weights,
        Meta(
            description="type of a quantized weight: W4A16, W8A16 or W8A8, FP8, MX, NVFP4 of llm-compressor; sparse: "
            "half of the weights, in 16 bits, from checkpoints alone"
        ),
    ] = "int4"
    strategy: Annotated[
        Strategy | None,
        Meta(description="which weights share a scale (int4: group; int8, fp8: channel, a row of the weight)"),
    ] = None
    group_size: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="strategy group: weights that share a scale, along in_features (64; mx 32, nvfp4 16)"),
    ] = None
    symmetric: Annotated[bool, Meta(description="integers: without a zero point")] = True
    dynamic_activations: Annotated[
        bool,
        Meta(
            description="all but int4: round activations to the type of the weights too, token by token or group by "
            "group while running; nvfp4 has a calibrated scale for them; not with kernel='packed'"
        ),
    ] = False
    static_activations: Annotated[
        bool, Meta(description="int8, fp8: round activations to it with one calibrated scale a layer, as above")
    ] = False
    layers: Annotated[
        LayerFormats[LayerFormat],
        Meta(
            description="layers with a format of their own, by patterns as in skip: weights, then group size or "
            "strategy, asymmetric, dynamic, static"
        ),
    ] = ()
    kernel: Annotated[
        Literal["auto", "packed", "library", "pack_mm", "decode"],
        Meta(
            description="packed: polyquant's own layout and kernels, on a CPU; pack_mm: torch's "
            "matmuls for packed int4 and int8 weights, on CPUs in bfloat16, the choice of library there; "
            "decode: unpack a layer's weight each time it is used; auto: packed where polyquant-kernels is "
            "installed, in float32"
        ),
    ] = "auto"  # type: ignore[assignment]  # the plugin has two of its own
    method: Annotated[
        Literal["rtn", "gptq", "unknown"],
        Meta(description="how weights are rounded: to nearest, or by GPTQ; unknown: the checkpoint does not say"),
    ] = "rtn"
    samples: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description=f"windows of text, of gptq and stored activation scales ({SAMPLES})"),
    ] = None
    length: Annotated[Annotated[int, Meta(ge=8)] | None, Meta(description=f"tokens of a window of text ({LENGTH})")] = (
        None
    )

    format_options: ClassVar[tuple[str, ...]] = CHOICES
    mixes: ClassVar[tuple[str, ...]] = ("linear", "head")

    def __post_init__(self) -> None:
        allowed = STRATEGIES[self.weights]
        strategy, group_size = settled(self.weights, self.strategy, self.group_size)
        if strategy not in allowed:
            raise ValueError(f"strategy {strategy!r} does not go with {self.weights}; use {', '.join(allowed)}")
        fixed = FIXED_GROUPS.get(self.weights)
        grouped = strategy in ("group", "tensor_group")
        if self.group_size is not None and (not grouped or fixed not in (None, self.group_size)):
            has = f"has groups of {fixed}" if fixed else f"with strategy {strategy!r} has no groups"
            raise ValueError(f"group_size {self.group_size} does not apply: {self.weights} {has}")
        if not self.symmetric and not self.weights.startswith("int"):
            raise ValueError(f"symmetric=False applies to int4 and int8 only; {self.weights} has no zero point")
        self._require_way(strategy)
        for name in ("samples", "length"):
            if getattr(self, name) is not None and not self.uses_text:
                raise ValueError(
                    f"{name} applies to method='gptq' and calibrated activations only; {self.method!r} uses no "
                    "calibration text"
                )
        if self.method == "gptq" and not self.weights.startswith("int"):
            raise ValueError(f"method 'gptq' applies to int4 and int8 only, not to {self.weights!r}")
        if self.method == "gptq" and (floats := [each for _, each in self.layers if not each.startswith("int")]):
            raise ValueError(f"method 'gptq' applies to int4 and int8 only, and layers has {floats[0]!r}")
        values: dict[str, object] = {"strategy": strategy, "group_size": group_size}
        if self.uses_text:
            values |= {"samples": self.samples or SAMPLES, "length": self.length or LENGTH}
        for name, value in values.items():
            msgspec.structs.force_setattr(self, name, value)

    def _require_way(self, strategy: Strategy) -> None:
        """Raises ValueError where activations cannot be rounded as asked beside such weights."""
        if self.dynamic_activations and self.static_activations:
            raise ValueError("dynamic_activations and static_activations exclude each other")
        there = ways(self.weights, strategy, symmetric=self.symmetric)
        if self.dynamic_activations and "dynamic" not in there:
            raise ValueError("dynamic_activations applies to symmetric int8, fp8, mxfp8, mxfp4 and nvfp4 only, not to "
                             "int8 in groups")  # fmt: skip
        if self.static_activations and "static" not in there:
            raise ValueError("static_activations applies to symmetric int8 and fp8 with a scale a row or a tensor only")

    @property
    def calibrates_activations(self) -> bool:
        """Whether any layer has a stored scale for its activations, which text is needed for."""
        own = (self.scheme, *(each for _, each in self.layers))
        return any(each.endswith("-static") or each == "nvfp4-dynamic" for each in own)

    @property
    def uses_text(self) -> bool:
        """Whether such a checkpoint is made with calibration text."""
        return self.method == "gptq" or (self.method == "rtn" and self.calibrates_activations)

    @property
    def rounding_method(self) -> RoundingMethod:
        """Of a checkpoint that does not say, the least: to nearest."""
        return "calibrated" if self.method == "gptq" else "nearest"

    @property
    def rounds_activations(self) -> bool:
        own = (self.scheme, *(each for _, each in self.layers))
        return any(each.endswith(("-dynamic", "-static")) for each in own)

    def activations_of(self, weight: WeightInfo) -> Activations | None:
        own = self.of(weight)
        return activations_beside(own.weights, own.strategy, symmetric=own.symmetric)

    @property
    def number_format(self) -> NumberFormat:
        if not self.weights.startswith("int"):
            return "floats"
        return "integers" if self.symmetric else "integers with zero points"

    @property
    def weight_bits(self) -> float:
        return BITS[self.weights]

    @property
    def scheme(self) -> str:
        """The type of the weights, with -dynamic or -static where activations are rounded too."""
        way = "-dynamic" if self.dynamic_activations else "-static" if self.static_activations else ""
        return f"{self.weights}{way}"

    @property
    def packed_format(self) -> str:
        """What llm-compressor calls the layout that it writes for these options."""
        if self.weights in FIXED_GROUPS:
            return f"{self.weights}-pack-quantized" if self.weights in FP4 else f"{self.weights}-quantized"
        rounded = self.scheme != self.weights
        if self.weights == "fp8":
            return "float-quantized" if rounded else "naive-quantized"
        return "int-quantized" if rounded else "pack-quantized"

    def format_of(self, weight: WeightInfo) -> str | None:
        """As of every backend that mixes formats; a checkpoint's targets may be patterns: `formats.first_fitting`."""
        return self._format_of(targeted(weight))

    def _format_of(self, module: str) -> str | None:
        named = dict(self.layers)
        chosen = first_fitting(module, named)
        return named[chosen] if chosen is not None else None

    def skips(self, weight: WeightInfo) -> bool:
        """As of every backend; a checkpoint's `ignore` may have patterns, and comes before its targets."""
        return is_ignored(module_of(weight), self.skip) or super().skips(weight)

    def of(self, weight: WeightInfo) -> Self:
        """The options of one layer, as if all had its format; kernel 'decode' where torch's matmuls are not for it."""
        return self.of_module(targeted(weight))

    def of_module(self, module: str) -> Self:
        """`of`, by the name of a module."""
        named = self._format_of(module)
        own = self._in_format(named) if named is not None else msgspec.structs.replace(self, layers=())
        return msgspec.structs.replace(own, kernel="decode") if own.kernel == "pack_mm" and not own._fits_torch else own

    @classmethod
    def of_format(cls, name: str) -> Mapping[str, Any]:
        """CHOICES of a format that are no defaults, and the weights."""
        chosen = choices_of(name)
        defaults = {field.name: field.default for field in msgspec.structs.fields(cls)}
        return {each: value for each, value in chosen.items() if each == "weights" or value != defaults[each]}

    def formats(self) -> dict[str, Self]:
        """Format -> the options, as if all layers had it: of those that single layers have, in their order."""
        return {name: self._in_format(name) for name in dict.fromkeys(chosen for _, chosen in self.layers)}

    def _in_format(self, name: str) -> Self:
        return msgspec.structs.replace(self, layers=(), **choices_of(name))

    @property
    def _fits_torch(self) -> bool:
        """Whether torch has a matmul for such packed weights, on a CPU in bfloat16."""
        return self.symmetric and (
            (self.weights == "int4" and self.group_size in PACK_GROUPS)
            or (self.scheme == "int8" and self.strategy == "channel")
        )

    def with_kernel(self, device: str, compute_dtype: str) -> Self:
        """These options with the kernel settled. Raises ConfigError where torch has none that was asked for."""
        fits = any(each._fits_torch for each in (self, *self.formats().values()))
        there = fits and device == "cpu" and compute_dtype == "bfloat16"
        if self.kernel == "pack_mm" and not there:
            raise ConfigError(
                "kernel='pack_mm' is for the CPU in bfloat16, symmetric int4 in groups of 32, 64, 128 or 256 and int8 "
                f"with a scale a row; here it is {self.scheme} in {compute_dtype} on {device}: use kernel='decode'"
            )
        chosen = self.kernel if self.kernel not in OWN_CHOICE else "pack_mm" if there else "decode"
        return msgspec.structs.replace(self, kernel=chosen)

    def own_fields(self) -> dict[str, Any]:
        """What compressed-tensors has no field for; a checkpoint's config has it under OWN."""
        return {name: getattr(self, name) for name in OWN_FIELDS}

    def to_stored(self) -> dict[str, Any]:
        """As compressed-tensors writes it; `skip`, by full names, is what it ignores.

        Raises ConfigError for rounded activations: only llm-compressor writes those.
        """
        if self.weights == "sparse":
            raise ConfigError(READ_ONLY)
        if self.rounds_activations:
            raise ConfigError(
                "a checkpoint whose activations are rounded is made by polyquant quantize, of a dense model"
            )
        schemes = {LINEAR: msgspec.structs.replace(self, layers=())} | self.formats()
        groups = {
            f"group_{number}": {
                "targets": [LINEAR] if name == LINEAR else [module for module, own in self.layers if own == name],
                "weights": weight_arguments(scheme), "input_activations": None, "output_activations": None,
                "format": scheme.packed_format,
            }
            for number, (name, scheme) in enumerate(schemes.items())
        }  # fmt: skip
        formats = {group["format"] for group in groups.values()}
        return {
            "quant_method": "compressed-tensors", "quantization_status": "compressed", "config_groups": groups,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision", "ignore": list(self.skip),
            "kv_cache_scheme": None, "global_compression_ratio": None,
        }  # fmt: skip

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        return msgspec.convert(read_stored(stored), cls)

    @classmethod
    def holding(cls, weights: Sequence[HeldWeight]) -> dict[str, Any]:
        """The format of most layers; the others have their own, where it has a name."""
        return held_formats(weights)
