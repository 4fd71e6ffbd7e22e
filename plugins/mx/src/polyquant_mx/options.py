"""Options of the five backends, and how checkpoints store them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.plugin import (
    Activations,
    HeldWeight,
    LayerFormats,
    MixableOptions,
    NumberFormat,
    PackableOptions,
    WeightInfo,
    module_of,
)

from polyquant_mx import formats
from polyquant_mx.formats import ALGOS, MIXED, OWN, Layout, Scheme, modelopt_settings, require_known, routers, skips

Algo = Literal["FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8", "W4A16_AWQ"]


class MxOptions(PackableOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the five have in common: numbers of few bits whose blocks share a scale."""

    method: ClassVar[str]
    """The quant_method of checkpoints."""
    converted: ClassVar[Mapping[str, Any]] = {}
    """Options of a checkpoint that others are converted into."""

    @property
    def number_format(self) -> NumberFormat:
        return "integers" if self.usual_scheme.codes == "int4" else "floats"

    @property
    def weight_bits(self) -> float:
        return self.usual_scheme.bits

    @property
    def scheme(self) -> str:
        """As the card names it."""
        return self.usual_scheme.name

    @property
    def usual_scheme(self) -> Scheme:
        """The format of a layer for which nothing else is said."""
        raise NotImplementedError

    @property
    def layout(self) -> Layout:
        """What checkpoints call a layer's tensors."""
        return formats.LAYOUTS[self.method]

    def scheme_for(self, weight: WeightInfo) -> Scheme:
        """The format of a weight."""
        return self.usual_scheme

    def activations_of(self, weight: WeightInfo) -> Activations | None:
        return self.scheme_for(weight).activations

    @classmethod
    def holding(cls, weights: Sequence[HeldWeight]) -> dict[str, Any]:
        formats.require_held(weights, msgspec.convert(cls.converted, cls).usual_scheme)
        return dict(cls.converted)

    def to_stored(self) -> dict[str, Any]:
        return {
            "quant_method": self.method, "compute_dtype": self.compute_dtype, "skip_modules": list(self.skip),
            "skip_defaults": self.skip_defaults,
        }  # fmt: skip


class Mxfp4Options(MxOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """OCP MXFP4: E2M1 in blocks of 32 whose scale is a power of two, as gpt-oss has its experts."""

    linears: Annotated[
        Literal["auto", "keep", "quantize"],
        Meta(
            description="linear layers: keep: dense, beside experts in MXFP4, as gpt-oss has them; auto: keep where a "
            "model has fused experts, else quantize"
        ),
    ] = "auto"

    method: ClassVar[str] = "mxfp4"
    converted: ClassVar[Mapping[str, Any]] = {"linears": "quantize"}

    @property
    def usual_scheme(self) -> Scheme:
        return formats.MXFP4

    def with_full_names(self, weights: Sequence[WeightInfo]) -> Self:
        """As of every backend; linear layers that are kept are named too, and routers with them."""
        named = super().with_full_names(weights)
        experts = any(weight.role == "experts" and not named.skips(weight) for weight in weights)
        if self.linears == "quantize" or (self.linears == "auto" and not experts):
            return named
        dense = [module_of(each) for each in weights if each.role in ("linear", "head") and not each.tied_to]
        skip = tuple(dict.fromkeys([*named.skip, *dense, *routers(weights)]))
        return msgspec.structs.replace(named, skip=skip, skip_defaults=False)

    def to_stored(self) -> dict[str, Any]:
        """transformers' Mxfp4Config, and what polyquant adds."""
        return {
            **super().to_stored(), "linears": self.linears, "modules_to_not_convert": self.stored_skip,
        }  # fmt: skip

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        known = {"quant_method", "modules_to_not_convert", "linears", "use_kernels", *OWN}
        require_known(stored, known, {"dequantize": (False,)})
        values = {"linears": stored.get("linears", "auto"), **skips(stored, stored.get("modules_to_not_convert"))}
        return msgspec.convert(values, cls)


class Mxfp8Options(MxOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """OCP MXFP8: E4M3 in blocks of 32 whose scale is a power of two, under transformers' names."""

    method: ClassVar[str] = "mxfp8"

    @property
    def usual_scheme(self) -> Scheme:
        return formats.MXFP8

    def to_stored(self) -> dict[str, Any]:
        """transformers' FineGrainedFP8Config, and what polyquant adds."""
        return {
            **super().to_stored(), "modules_to_not_convert": self.stored_skip, "weight_block_size": [1, 32],
            "scale_fmt": "ue8m0", "activation_scheme": "dynamic", "dequantize": False,
        }  # fmt: skip

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        expected = {
            "weight_block_size": ([1, 32], (1, 32)), "scale_fmt": ("ue8m0",), "activation_scheme": ("dynamic",),
            "dequantize": (False,), "expert_dtype": ("fp8",), "fmt": ("e4m3", "e4m3fn", "float8_e4m3fn"),
            "modules_to_convert": ([], ()),
        }  # fmt: skip
        require_known(stored, {"quant_method", "modules_to_not_convert", "ignored_layers", *OWN}, expected)
        dense = stored.get("modules_to_not_convert")
        return msgspec.convert(skips(stored, stored.get("ignored_layers") if dense is None else dense), cls)


class NvidiaOptions(MxOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a checkpoint of NVIDIA's ModelOpt says."""

    method: ClassVar[str] = "modelopt"


class ModelOptOptions(MixableOptions, NvidiaOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """NVIDIA ModelOpt's checkpoints: FP8, NVFP4, MXFP8 and INT4 weights. Activations are not rounded."""

    quant_algo: Annotated[Algo, Meta(description="what is done to linear layers, as ModelOpt calls it")] = "W4A16_NVFP4"
    group_size: Annotated[
        int,
        Meta(ge=16, description="weights along in_features that share a scale, of W4A16_AWQ; others have their own"),
    ] = 128
    layers: Annotated[
        LayerFormats[Algo],
        Meta(description="other formats of single modules: a table from name patterns to quant_algo"),
    ] = ()

    format_options: ClassVar[tuple[str, ...]] = ("quant_algo",)
    mixes: ClassVar[tuple[str, ...]] = ("linear", "head", "experts")

    @property
    def usual_scheme(self) -> Scheme:
        return self.scheme_of(self.quant_algo)

    def scheme_of(self, algo: str) -> Scheme:
        """The format of the weights that `algo` makes."""
        found = ALGOS[algo]
        return found._replace(columns=self.group_size) if found is formats.INT4 else found

    def scheme_for(self, weight: WeightInfo) -> Scheme:
        return self.scheme_of(self.format_of(weight) or self.quant_algo)

    def to_stored(self) -> dict[str, Any]:
        """As ModelOpt's export writes config.json, and what polyquant adds. Of mixed formats see `with_layers`."""
        return {
            **super().to_stored(), "quant_algo": self.quant_algo, "ignore": list(self.skip),
            "producer": {"name": "polyquant"}, **self._said_of(self.quant_algo),
        } | ({"layers": dict(self.layers)} if self.layers else {})  # fmt: skip

    def with_layers(self, stored: Mapping[str, Any], weights: Sequence[WeightInfo]) -> dict[str, Any]:
        """`stored` with what ModelOpt says of each layer where formats are mixed. weights: those that are quantized."""
        if not self.layers:
            return dict(stored)
        algos = {module_of(weight): self.format_of(weight) or self.quant_algo for weight in weights}
        layers = {name: {"quant_algo": algo, **self._said_of(algo)} for name, algo in algos.items()}
        kept = {name: value for name, value in stored.items() if name not in ("group_size", "layers")}
        return {**kept, "quant_algo": MIXED, "quantized_layers": layers}

    def _said_of(self, algo: str) -> dict[str, int]:
        """ModelOpt names the size of groups of what has groups."""
        found = self.scheme_of(algo)
        return {"group_size": found.columns} if found.columns and found.rows == 1 else {}

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        """Raises ValueError where layers have INT4 groups of several sizes."""
        own = dict(stored)
        ours = own.pop("layers", None)
        values, layers = modelopt_settings(own)
        algos = {name: str(each["quant_algo"]) for name, each in layers.items()}
        sizes = {each.get("group_size", values["group_size"]) for each in layers.values()
                 if each["quant_algo"] == "W4A16_AWQ"}  # fmt: skip
        if values["quant_algo"] == MIXED:
            counts = list(algos.values())
            values["quant_algo"] = max(sorted(set(counts)), key=counts.count)
        elif values["quant_algo"] == "W4A16_AWQ":
            sizes |= {values["group_size"] or 128}
        if len(sizes) > 1:
            raise ValueError(f"its INT4 layers have groups of {', '.join(map(str, sorted(sizes)))}; one size is read")
        values["group_size"] = sizes.pop() if sizes else 128
        others = {name: algo for name, algo in algos.items() if algo != values["quant_algo"]}
        return msgspec.convert({**values, "layers": tuple((ours or others).items())}, cls)


class Nvfp4Options(NvidiaOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """NVFP4 weights: E2M1 in blocks of 16 with an E4M3 scale, and one scale for the matrix; as ModelOpt stores them."""

    @property
    def usual_scheme(self) -> Scheme:
        return formats.NVFP4

    def to_stored(self) -> dict[str, Any]:
        """As ModelOpt's export writes config.json, and what polyquant adds."""
        return {
            **super().to_stored(), "quant_algo": "W4A16_NVFP4", "group_size": 16, "ignore": list(self.skip),
            "producer": {"name": "polyquant"},
        }  # fmt: skip

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        values, _ = modelopt_settings(stored)
        if ALGOS.get(values.pop("quant_algo")) is not formats.NVFP4:
            raise ValueError(f"its quant_algo is {stored.get('quant_algo')!r}; the backend modelopt reads it")
        values.pop("group_size")
        return msgspec.convert(values, cls)


class FpQuantOptions(MxOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """FP-Quant: MXFP4 or NVFP4 of weights that a Hadamard matrix has rotated; inputs are rotated, and not rounded."""

    forward_dtype: Annotated[Literal["mxfp4", "nvfp4"], Meta(description="format of the rotated weights")] = "nvfp4"
    hadamard_group_size: Annotated[
        Literal[0, 16, 32, 64, 128],
        Meta(description="columns that are rotated together; 0: as many as a block has, 32 of mxfp4 and 16 of nvfp4"),
    ] = 0

    method: ClassVar[str] = "fp_quant"

    def __post_init__(self) -> None:
        if self.forward_dtype == "mxfp4" and self.hadamard_group_size == 16:
            raise ValueError("hadamard_group_size of mxfp4 must be 32, 64 or 128, got 16")
        if self.kernel == "packed":
            raise ValueError("kernel must be 'auto' or 'library': rotated weights have no place in the packed layout")

    @property
    def usual_scheme(self) -> Scheme:
        found = formats.MXFP4_ROTATED if self.forward_dtype == "mxfp4" else formats.NVFP4_ROTATED
        return found._replace(rotation=self.hadamard_group_size or found.columns)

    def to_stored(self) -> dict[str, Any]:
        """transformers' FPQuantConfig, and what polyquant adds."""
        return {
            **super().to_stored(), "forward_dtype": self.forward_dtype, "forward_method": "abs_max",
            "hadamard_group_size": self.usual_scheme.rotation, "backward_dtype": "bf16", "pseudoquantization": False,
            "store_master_weights": False, "transform_init": "hadamard", "modules_to_not_convert": self.stored_skip,
        }  # fmt: skip

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        if stored.get("pseudoquantization"):
            raise ValueError(
                "its pseudoquantization is True: its weights are dense numbers that were rounded (dqweight), so there "
                "is nothing packed to read; write it with pseudoquantization=False, or quantize the dense model"
            )
        if stored.get("store_master_weights"):
            raise ValueError(
                "its store_master_weights is True: it holds dense weights alone; load those as a dense model"
            )
        known = {
            "quant_method", "forward_dtype", "hadamard_group_size", "modules_to_not_convert", "backward_dtype",
            "forward_method", "transform_init", *OWN,
        }  # fmt: skip
        require_known(stored, known, {"pseudoquantization": (False,), "store_master_weights": (False,)})
        dtype = stored.get("forward_dtype", "nvfp4")
        size = stored.get("hadamard_group_size") or 0
        values = {
            "forward_dtype": dtype,
            "hadamard_group_size": 0 if size == {"mxfp4": 32, "nvfp4": 16}.get(dtype) else size,
            **skips(stored, stored.get("modules_to_not_convert")),
        }
        return msgspec.convert(values, cls)
