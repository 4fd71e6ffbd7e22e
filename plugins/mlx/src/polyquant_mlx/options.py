"""Options of the MLX backend, and how config.json stores them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.errors import Misfit
from polyquant.plugin import (
    E2M1,
    HeldWeight,
    LayerFormats,
    MixableOptions,
    NumberFormat,
    PackableOptions,
    WeightInfo,
)
from polyquant.plugin.layouts import size_held

from polyquant_mlx.formats import BITS, FLOATS, FORMATS, GROUPS, METAL_BITS, Bits, Format, FormatName, Group, Mode
from polyquant_mlx.names import paths_in_mlx

METAL_KEYS = {"quant_method", "bits", "group_size", "modules_to_not_convert", "dequantize"}
MLX_KEYS = {"quant_method", "bits", "group_size", "mode"}
OWN = "polyquant"
"""Of what a loaded model's config carries: what these formats have no words for. No file has it."""
OWN_FIELDS = ("vocabulary", "scale_dtype", "skip", "skip_defaults", "compute_dtype")


class MlxOptions(MixableOptions, PackableOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A format of MLX's, for all layers or for single ones."""

    mode: Annotated[
        Mode, Meta(description="affine: integers with a scale and a bias a group; or floats of 4 or 8 bits")
    ] = "affine"
    bits: Annotated[Bits | None, Meta(description="bits of a weight (affine 4; others have one number of bits)")] = None
    group_size: Annotated[
        Group | None, Meta(description="weights that share a scale, along in_features (affine 64; mxfp 32, nvfp4 16)")
    ] = None
    vocabulary: Annotated[
        Literal["quantize", "dense"] | None,
        Meta(description="embedding and output head: quantize, as mlx-lm does, or dense (quantize; metal: dense)"),
    ] = None
    scale_dtype: Annotated[
        Literal["bfloat16", "float16", "float32"],
        Meta(
            description="affine: dtype of scales and biases, to which weights are rounded first, as by mlx-lm's --dtype"
        ),
    ] = "bfloat16"
    layers: Annotated[
        LayerFormats[FormatName],
        Meta(description="layers with a format of their own, embedding and head too, by patterns as in skip"),
    ] = ()
    layout: Annotated[
        Literal["mlx", "metal"],
        Meta(description="what is saved: mlx: a folder that mlx-lm runs; metal: transformers' for Apple GPUs, affine"),
    ] = "mlx"

    format_options: ClassVar[tuple[str, ...]] = ("mode", "bits", "group_size")
    mixes: ClassVar[tuple[str, ...]] = ("linear", "head", "embedding", "experts")
    takes_experts: ClassVar[bool] = True
    quantizes_vocabulary: ClassVar[bool] = True

    def __post_init__(self) -> None:
        fixed = FLOATS.get(self.mode)
        bits, group = fixed[1:] if fixed else (self.bits or 4, self.group_size or 64)
        if fixed and (self.bits or bits, self.group_size or group) != (bits, group):
            raise ValueError(f"{self.mode} has {bits} bits in groups of {group}: leave bits and group_size out")
        if group not in GROUPS and not fixed:
            raise ValueError(f"group_size of affine must be 32, 64 or 128, got {group}")
        vocabulary = self.vocabulary or ("dense" if self.layout == "metal" else "quantize")
        for name, value in {"bits": bits, "group_size": group, "vocabulary": vocabulary}.items():
            msgspec.structs.force_setattr(self, name, value)
        if self.layout == "metal":
            if self.mode != "affine" or bits not in METAL_BITS:
                raise ValueError(f"layout 'metal' is for affine weights of 2, 4 or 8 bits, not {self.format.scheme}")
            if self.layers or vocabulary != "dense":
                raise ValueError("layout 'metal' has one format for all linear layers, and dense embeddings and heads")

    @property
    def format(self) -> Format:
        """Of all layers that `layers` does not name."""
        assert self.bits is not None  # set when the record is made
        assert self.group_size is not None
        return Format(self.mode, self.bits, self.group_size)

    def format_for(self, weight: WeightInfo) -> Format:
        """Of one tensor, if it is quantized."""
        named = self.format_of(weight)
        return self.format if named is None else FORMATS[named]

    def format_of(self, weight: WeightInfo) -> str | None:
        """As of every backend that mixes formats; a checkpoint names modules as MLX has them."""
        named = dict(self.layers)
        if (own := super().format_of(weight)) is not None:
            return own
        return next((named[path] for path in paths_in_mlx(weight.name) if path in named), None)

    def with_full_names(self, weights: Sequence[WeightInfo]) -> Self:
        """As of every backend that mixes formats; the head is no default to stay dense where vocabularies do not."""
        taken = self.vocabulary == "quantize"
        return super().with_full_names(
            [msgspec.structs.replace(each, default_skip=False) if taken and each.role == "head" else each
             for each in weights]
        )  # fmt: skip

    def skips(self, weight: WeightInfo) -> bool:
        """As of every backend that mixes formats; the head as `vocabulary` says."""
        if weight.role == "head" and self.vocabulary == "quantize":
            weight = msgspec.structs.replace(weight, default_skip=False)
        return super().skips(weight)

    @classmethod
    def of_format(cls, name: str) -> Mapping[str, Any]:
        form = FORMATS[name]
        if form.mode != "affine":
            return {"mode": form.mode}
        return {"bits": form.bits, "group_size": form.group_size}

    @property
    def number_format(self) -> NumberFormat:
        return "integers with zero points" if self.mode == "affine" else "floats"

    @property
    def weight_bits(self) -> float:
        return self.format.bits

    @property
    def scheme(self) -> str:
        return self.format.scheme

    def to_stored(self) -> dict[str, Any]:
        """What a loaded model's config carries; `_load.save` writes what MLX and transformers have words for."""
        own = {OWN: {name: getattr(self, name) for name in OWN_FIELDS}}
        if self.layout == "metal":
            return {
                "quant_method": "metal", "bits": self.bits, "group_size": self.group_size,
                "modules_to_not_convert": self.stored_skip, **own,
            }  # fmt: skip
        layers = {name: FORMATS[each].keys for name, each in self.layers}
        return {"quant_method": "mlx", **self.format.keys, **layers, **own}

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        own = stored.get(OWN, {})
        stored = {name: value for name, value in stored.items() if name != OWN}
        if stored.get("quant_method") == "metal":
            return cls._from_metal(stored, own)
        form = _format({key: stored[key] for key in MLX_KEYS & set(stored)}, "quantization")
        layers = {path: _format(said, path) for path, said in stored.items() if isinstance(said, Mapping)}
        unread = {key: said for key, said in stored.items()
                  if key not in MLX_KEYS and not isinstance(said, (Mapping, bool))}  # fmt: skip
        if unread:
            raise ValueError("; ".join(f"its {name} is {said!r}, which is not read" for name, said in unread.items()))
        return msgspec.convert(
            {"mode": form.mode, "bits": form.bits, "group_size": form.group_size,
             "layers": tuple((path, each.name) for path, each in layers.items()), **own},
            cls,
        )  # fmt: skip

    @classmethod
    def holding(cls, weights: Sequence[HeldWeight]) -> dict[str, Any]:
        """The format of most layers; the others have their own. Embedding and head stay as they are."""
        forms = {weight.name: _held(weight).name for weight in weights}
        (most, _), *_ = Counter(forms.values()).most_common(1)
        dtypes = {weight.scale_dtype for weight in weights}
        return {
            **cls.of_format(most), "vocabulary": "dense",
            "scale_dtype": dtypes.pop() if len(dtypes) == 1 else "float32",
            "layers": tuple((name, form) for name, form in forms.items() if form != most),
        }  # fmt: skip

    @classmethod
    def _from_metal(cls, stored: Mapping[str, Any], own: Mapping[str, Any]) -> Self:
        if unread := sorted(set(stored) - METAL_KEYS) or (["dequantize"] if stored.get("dequantize") else []):
            raise ValueError("; ".join(f"its {name} is {stored[name]!r}, which is not read" for name in unread))
        dense = stored.get("modules_to_not_convert")
        skip = {} if dense is None else {"skip": tuple(dense), "skip_defaults": False}
        sizes = {key: stored[key] for key in ("bits", "group_size") if key in stored}
        return msgspec.convert({"layout": "metal", **sizes, **skip, **own}, cls)


def _held(weight: HeldWeight) -> Format:
    """The format that holds a weight as it is. Raises Misfit."""
    if weight.ordered:
        raise Misfit("act-order", "its columns belong to groups in an order of their own, and MLX's follow")
    if weight.kind == "integers":
        return FORMATS[f"affine{weight.bits}-g{size_held([weight], GROUPS)}"]
    in_sixteens = weight.group_size == FLOATS["nvfp4"].group_size
    mode = "mxfp8" if weight.kind == "floats" else "nvfp4" if in_sixteens else "mxfp4"
    if weight.kind == "code book" and weight.table != E2M1:
        raise Misfit("bits", "its codes are entries of a code book, and of those E2M1's are held")
    size_held([weight], (FLOATS[mode].group_size,))
    return FLOATS[mode]


def _format(said: Mapping[str, Any], where: str) -> Format:
    """A format as config.json has it: group_size, bits and mode, which is affine where it is left out."""
    mode, bits, group = said.get("mode", "affine"), said.get("bits"), said.get("group_size")
    fixed = FLOATS.get(mode) if isinstance(mode, str) else None
    found = (mode, bits if bits is not None or not fixed else fixed.bits,
             group if group is not None or not fixed else fixed.group_size)  # fmt: skip
    unread = set(said) - MLX_KEYS
    form = next((form for form in FORMATS.values() if tuple(form) == found), None)
    if form is None or unread:
        known = f"affine has {', '.join(map(str, BITS))} bits in groups of {', '.join(map(str, GROUPS))}"
        wrong = f", and {', '.join(sorted(unread))} is not read" if unread else ""
        raise ValueError(f"{where} has mode {mode!r}, {bits!r} bits, groups of {group!r}{wrong}: {known}; mxfp4, nvfp4 "
                         "and mxfp8 one format each")  # fmt: skip
    return form
