"""Options of the compressed-tensors backend, and what a checkpoint's quantization_config stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.errors import ConfigError
from polyquant.plugin import NumberFormat, PackableOptions, RoundingMethod

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
OWN_CHOICE = ("auto", "library")  # kernel options that leave the choice to this package

OWN = "polyquant"  # key for what compressed-tensors has no field for
OWN_FIELDS = ("method", "samples", "length", "compute_dtype")
PLAIN = ("int-quantized", "float-quantized", "naive-quantized")  # weights a byte each
UNREAD = {"kv_cache_scheme": "quantizes the key-value cache", "transform_config": "rotates activations"}
FORMATS: Mapping[tuple[str, int], Mapping[str, tuple[str, ...]]] = {  # (type, bits) -> option -> its formats
    ("int", 4): {"int4": ("pack-quantized",)},
    ("int", 8): {"int8": ("pack-quantized", *PLAIN)},
    ("float", 8): {"fp8": PLAIN},
    ("float", 4): {"mxfp4": ("mxfp4-pack-quantized",), "nvfp4": ("nvfp4-pack-quantized",)},
}


class CompressedTensorsOptions(PackableOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
        bool,
        Meta(
            description="int8, fp8: round activations to the same type too, token by token while running; not int8's "
            "with kernel='packed'"
        ),
    ] = False
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
        Annotated[int, Meta(ge=1)] | None, Meta(description=f"gptq: windows of calibration text ({SAMPLES})")
    ] = None
    length: Annotated[
        Annotated[int, Meta(ge=8)] | None, Meta(description=f"gptq: tokens of a window of text ({LENGTH})")
    ] = None

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
    def rounding_method(self) -> RoundingMethod:
        """Of a checkpoint that does not say, the least: to nearest."""
        return "calibrated" if self.method == "gptq" else "nearest"

    @property
    def rounds_activations(self) -> bool:
        return self.dynamic_activations

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
        chosen = self.kernel if self.kernel not in OWN_CHOICE else "pack_mm" if there else "decode"
        return msgspec.structs.replace(self, kernel=chosen)

    def own_fields(self) -> dict[str, Any]:
        """What compressed-tensors has no field for; a checkpoint's config has it under OWN."""
        return {name: getattr(self, name) for name in OWN_FIELDS}

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        return msgspec.convert(_read_stored(stored), cls)


def _read_stored(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The options as plain values.

    Raises ValueError or TypeError, saying which part, for what cannot be run as it was meant.
    """
    groups = _mapping(stored, "config_groups")
    for name, what in UNREAD.items():
        if stored.get(name):
            raise ValueError(f"it {what} ({name}), which is not run")
    sparse = _mapping(stored, "sparsity_config").get("format", "dense")
    if sparse != "dense":
        raise ValueError(f"its weights are sparse ({sparse}), which is not read")
    if len(groups) != 1:
        raise ValueError(f"it has {len(groups)} config_groups ({', '.join(groups)}); one for all layers is read")
    group = _mapping(groups, *groups)
    if list(group.get("targets") or ()) != ["Linear"]:
        raise ValueError(f"it targets {group.get('targets')}; ['Linear'] is read, with layers left out by ignore")
    if group.get("output_activations"):
        raise ValueError("it quantizes output activations (output_activations), which is not run")
    values = _weights(_mapping(group, "weights"), group.get("format") or stored.get("format"))
    activations = _mapping(group, "input_activations")
    values["dynamic_activations"] = _activations(activations, values["weights"], values["strategy"])
    noted = _mapping(stored, OWN) or {"method": "unknown"}
    own = {name: noted[name] for name in OWN_FIELDS if name in noted}
    return {**values, **own, "skip": _ignored(stored.get("ignore") or ()), "skip_defaults": False}


def _mapping(holder: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = holder.get(name) or {}
    if not isinstance(value, Mapping):
        raise TypeError(f"its {name} is {value!r}, no mapping")
    return value


def _ignored(patterns: Sequence[str]) -> tuple[str, ...]:
    for pattern in patterns:
        try:
            re.compile(str(pattern).removeprefix("re:") if str(pattern).startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"{pattern!r} in its ignore is no regular expression: {error}") from error
    return tuple(patterns)


def plain_format(stored: Mapping[str, Any]) -> bool:
    """Whether the checkpoint keeps each weight in a byte, under the name `weight`."""
    group = next(iter(stored["config_groups"].values()))
    return (group.get("format") or stored.get("format")) in PLAIN


def _weights(arguments: Mapping[str, Any], packed_format: str | None) -> dict[str, Any]:
    kind = (str(arguments.get("type", "int")), int(arguments.get("num_bits", 8)))
    fitting = FORMATS.get(kind, {})
    name = next((name for name, formats in fitting.items() if packed_format in formats), None)
    if name is None:
        readable = [f"{word} of {bits} bits as {' or '.join(sum(formats.values(), ()))}"
                    for (word, bits), formats in FORMATS.items()]  # fmt: skip
        raise ValueError(
            f"its weights are {kind[0]} of {kind[1]} bits in format {packed_format!r}; read are {'; '.join(readable)}"
        )
    if arguments.get("dynamic"):
        raise ValueError("its weights are quantized dynamically, which is not read")
    if str(arguments.get("actorder")) in ("group", "dynamic", "True"):
        raise ValueError("it orders weights by activation (actorder 'group', weight_g_idx), which 0.19 no longer reads")
    size = arguments.get("group_size")
    strategy = arguments.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy == "block" and list(arguments.get("block_structure") or ()) != [128, 128]:
        raise ValueError(f"its blocks are {arguments.get('block_structure')}; [128, 128] is read")
    symmetric = bool(arguments.get("symmetric", True))
    grouped = strategy in ("group", "tensor_group")
    return {
        "weights": name, "strategy": strategy, "group_size": size if grouped else None, "symmetric": symmetric,
    }  # fmt: skip


def _activations(arguments: Mapping[str, Any], weights: str, strategy: str) -> bool:
    """Whether activations are rounded while running. Raises ValueError for a way that is not run."""
    if not arguments:
        return False
    kind = {"int": "int", "float": "fp"}.get(str(arguments.get("type", "int")), "?")
    found = f"{kind}{arguments.get('num_bits', 8)}"
    if arguments.get("dynamic") is not True:
        raise ValueError(f"it quantizes activations to {found} with stored scales (static or local), which is not run")
    how = (arguments.get("strategy"), arguments.get("group_size"), bool(arguments.get("symmetric", True)))
    wanted = ("group", 128, True) if strategy == "block" else ("token", None, True)
    if found != weights or how != wanted:
        raise ValueError(
            f"it rounds activations to {found} ({how[0]}, group {how[1]}, symmetric {how[2]}) for {weights}; "
            f"{weights} ({wanted[0]}, group {wanted[1]}, symmetric) is run, for int8 and fp8"
        )
    return True
