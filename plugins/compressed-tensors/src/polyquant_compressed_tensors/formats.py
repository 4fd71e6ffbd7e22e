"""What compressed-tensors stores: kinds of weights, formats of single layers, what a quantization_config stands for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, get_args

from polyquant.errors import Misfit, ModelError
from polyquant.plugin import E2M1, HeldWeight, WeightInfo, module_of

from polyquant_compressed_tensors.arguments import FIXED_GROUPS, Weights, read_way

Strategy = Literal["tensor", "channel", "group", "block", "tensor_group"]
STRATEGIES: Mapping[Weights, tuple[Strategy, ...]] = {  # the first is the default
    "int4": ("group", "channel"),
    "int8": ("channel", "group"),
    "fp8": ("channel", "block", "tensor"),
    "mxfp8": ("group",),
    "mxfp4": ("group",),
    "nvfp4": ("tensor_group",),
    "sparse": ("tensor",),
}
FP4, MX = ("mxfp4", "nvfp4"), ("mxfp4", "mxfp8")  # codes of 4 bits that are floats; scales that are powers of two
DEFAULT_GROUP = 64

SPARSE = "sparse-24-bitmask"
OWN = "polyquant"  # key for what compressed-tensors has no field for
OWN_FIELDS = ("method", "samples", "length", "compute_dtype")
NAIVE = ("int-quantized", "float-quantized", "naive-quantized")
PLAIN = (*NAIVE, "mxfp8-quantized")  # weights a byte each
UNREAD = {"kv_cache_scheme": "quantizes the key-value cache", "transform_config": "rotates activations"}
FORMATS: Mapping[tuple[str, int], Mapping[str, tuple[str, ...]]] = {  # (type, bits) -> option -> its formats
    ("int", 4): {"int4": ("pack-quantized",)},
    ("int", 8): {"int8": ("pack-quantized", *NAIVE)},
    ("float", 8): {"fp8": NAIVE, "mxfp8": ("mxfp8-quantized",)},
    ("float", 4): {"mxfp4": ("mxfp4-pack-quantized",), "nvfp4": ("nvfp4-pack-quantized",)},
}

LayerFormat = Literal[
    "int4", "int4-32", "int4-128", "int4-channel",
    "int4-asymmetric", "int4-32-asymmetric", "int4-128-asymmetric", "int4-channel-asymmetric",
    "int8", "int8-32", "int8-64", "int8-128",
    "int8-asymmetric", "int8-32-asymmetric", "int8-64-asymmetric", "int8-128-asymmetric", "int8-dynamic", "int8-static",
    "fp8", "fp8-block", "fp8-tensor", "fp8-dynamic", "fp8-block-dynamic", "fp8-tensor-dynamic",
    "fp8-static", "fp8-tensor-static", "mxfp8", "mxfp8-dynamic", "mxfp4", "mxfp4-dynamic", "nvfp4", "nvfp4-dynamic",
]  # fmt: skip
"""The weights, then what differs from these weights' defaults: group size or strategy, a zero point, activations."""
NAMES: tuple[str, ...] = get_args(LayerFormat)
CHOICES = ("weights", "strategy", "group_size", "symmetric", "dynamic_activations", "static_activations")
"""The options that a name stands for."""
SHARING = (
    ("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj"), ("q_a_proj", "kv_a_proj_with_mqa"), ("w1", "w3"),
)  # fmt: skip
"""Layers beside each other that vLLM runs as one: where one is nvfp4, llm-compressor gives all of them one scale."""
LINEAR = "Linear"
"""The class that a config group targets for all layers that no name or pattern of another group fits."""


def settled(weights: Weights, strategy: Strategy | None, group_size: int | None) -> tuple[Strategy, int | None]:
    """Strategy and group size, defaults filled in. Not checked."""
    allowed = STRATEGIES[weights]
    chosen: Strategy = strategy or ("group" if group_size and "group" in allowed else allowed[0])
    grouped = chosen in ("group", "tensor_group")
    return chosen, (group_size or FIXED_GROUPS.get(weights) or DEFAULT_GROUP) if grouped else group_size


def choices_of(name: str) -> dict[str, Any]:
    """CHOICES of a format; None is the default of its weights."""
    weights, *words = name.split("-")
    found: dict[str, Any] = dict.fromkeys(CHOICES) | {
        "weights": weights, "symmetric": "asymmetric" not in words, "dynamic_activations": "dynamic" in words,
        "static_activations": "static" in words,
    }  # fmt: skip
    for word in words:
        if word.isdigit():
            found["group_size"] = int(word)
        elif word not in ("asymmetric", "dynamic", "static"):
            found["strategy"] = word
    return found


def fits(module: str, pattern: str) -> bool:
    """Whether a pattern of a checkpoint is the module's name, or `re:` and a regular expression that it begins with."""
    return re.match(pattern[3:], module) is not None if pattern.startswith("re:") else pattern == module


def is_ignored(module: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern of a checkpoint's `ignore` fits the module."""
    return any(fits(module, pattern) for pattern in patterns)


def first_fitting(module: str, targets: Iterable[str]) -> str | None:
    """The target that compressed-tensors takes for a Linear module: its name, then patterns, then the class."""
    found = sorted((target for target in targets if fits(module, target)), key=lambda target: ("re:" in target, target))
    return found[0] if found else LINEAR if LINEAR in targets else None


def joined_matrices(stack: str) -> int:
    """How many matrices of an expert are one tensor of the model. stack: its name."""
    return 2 if stack.endswith("gate_up_proj") else 1


def stored_expert(stack: str) -> str:
    """The first matrix of the first expert of a stack, as a checkpoint names it: what targets are held against."""
    owner, _, name = stack.rpartition(".")
    return f"{owner}.0.{name.replace('gate_up_proj', 'gate_proj')}"


def group_of(module: str, groups: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The config group that a Linear module belongs to; None where none targets it."""
    by_target = {target: group for group in groups.values() for target in group["targets"]}
    chosen = first_fitting(module, list(by_target))
    return by_target[chosen] if chosen is not None else None


def read_stored(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The options as plain values.

    Raises ValueError or TypeError, saying which part, for what cannot be run as it was meant.
    """
    groups = _mapping(stored, "config_groups")
    for name, what in UNREAD.items():
        if stored.get(name):
            raise ValueError(f"it {what} ({name}), which is not run")
    sparsity = _mapping(stored, "sparsity_config")
    sparse = sparsity.get("format", "dense")
    if sparse not in ("dense", SPARSE):
        raise ValueError(f"its weights are sparse ({sparse}); {SPARSE} is read")
    noted = _mapping(stored, OWN) or {"method": "unknown"}
    own = {name: noted[name] for name in OWN_FIELDS if name in noted}
    if not groups and sparse == SPARSE:
        skip = _patterns(sparsity.get("ignore") or (), "sparsity_config's ignore")
        return {"weights": "sparse", **own, "skip": skip, "skip_defaults": False}
    if not groups:
        raise ValueError("it has no config_groups, so that nothing in it is quantized")
    targets = {name: _targets(name, _mapping(groups, name)) for name in groups}
    counts = Counter(target for own in targets.values() for target in own)
    if twice := [target for target, count in counts.items() if count > 1]:
        raise ValueError(f"several of its config_groups ({', '.join(groups)}) target {twice[0]!r}")
    chosen = {name: _choices(_mapping(groups, name), stored.get("format")) for name in groups}
    base = next((name for name in groups if LINEAR in targets[name]), next(iter(groups)))
    layers = [
        (target, _named(name, chosen[name]))
        for name in groups if len(groups) > 1 for target in targets[name] if target != LINEAR
    ]  # fmt: skip
    skip = _patterns(stored.get("ignore") or (), "ignore")
    return {**chosen[base], **own, "layers": layers, "skip": skip, "skip_defaults": False}


def _targets(name: str, group: Mapping[str, Any]) -> tuple[str, ...]:
    """Names, patterns and 'Linear'. Raises ValueError for other classes, and where there are none."""
    targets = tuple(map(str, group.get("targets") or ()))
    other = [each for each in targets if each[:1].isupper() and "." not in each and each != LINEAR]
    if other or not targets:
        what = f"targets {', '.join(other)}" if other else "has no targets"
        raise ValueError(f"its {name} {what}; {LINEAR!r}, names of modules and patterns (re:) are read")
    return _patterns(targets, f"{name}'s targets")


def _choices(group: Mapping[str, Any], packed_format: str | None) -> dict[str, Any]:
    """The options of the layers of a config group. packed_format: of all groups that name none."""
    if group.get("output_activations"):
        raise ValueError("it quantizes output activations (output_activations), which is not run")
    values = _weights(_mapping(group, "weights"), group.get("format") or packed_format)
    way = read_way(_mapping(group, "input_activations"), values)
    values |= {"dynamic_activations": way == "dynamic", "static_activations": way == "static"}
    return values


def _named(group: str, choices: Mapping[str, Any]) -> str:
    """The format of single layers that these options are. Raises ValueError where it has no name."""
    name = _names().get(tuple(choices[each] for each in CHOICES))
    if name is None:
        said = ", ".join(f"{each} {choices[each]}" for each in CHOICES if choices[each] is not None)
        raise ValueError(f"its {group} has {said}; single layers are read in {', '.join(NAMES)}")
    return name


@cache
def _names() -> Mapping[tuple[Any, ...], str]:
    """CHOICES, with defaults settled -> the name of the format."""
    found = {}
    for name in NAMES:
        own = choices_of(name)
        own["strategy"], own["group_size"] = settled(own["weights"], own["strategy"], own["group_size"])
        found[tuple(own[each] for each in CHOICES)] = name
    return found


def format_name(choices: Mapping[str, Any]) -> str:
    """The format of single layers that some of CHOICES are, the others at their defaults. Raises Misfit for none."""
    own = {**dict.fromkeys(CHOICES), "symmetric": True, **dict.fromkeys(CHOICES[-2:], False), **choices}
    own["strategy"], own["group_size"] = settled(own["weights"], own["strategy"], own["group_size"])
    name = _names().get(tuple(own[each] for each in CHOICES))
    if name is None:
        said = ", ".join(f"{each} {own[each]}" for each in CHOICES if own[each] is not None)
        raise Misfit(
            "group size", f"it has {said} beside other layers, and single layers are held in {', '.join(NAMES)}"
        )
    return name


def _mapping(holder: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = holder.get(name) or {}
    if not isinstance(value, Mapping):
        raise TypeError(f"its {name} is {value!r}, no mapping")
    return value


def _patterns(patterns: Sequence[str], where: str) -> tuple[str, ...]:
    for pattern in patterns:
        try:
            re.compile(str(pattern).removeprefix("re:") if str(pattern).startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"{pattern!r} in its {where} is no regular expression: {error}") from error
    return tuple(patterns)


def plain_format(stored: Mapping[str, Any], module: str) -> bool:
    """Whether the checkpoint keeps each weight of a module in a byte, under the name `weight`.

    Raises ModelError where no config group says what it is.
    """
    group = group_of(module, stored["config_groups"])
    if group is None:
        raise ModelError("it is packed, and no config group targets it")
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


def held_formats(weights: Sequence[HeldWeight]) -> dict[str, Any]:
    """The options of a checkpoint that holds weights of another as they are: the format of most layers, and `layers`.

    Raises Misfit.
    """
    own = {weight.name: _held(weight) for weight in weights}
    names = Counter(map(str, own.values()))
    most = names.most_common(1)[0][0]
    base = next(options for options in own.values() if str(options) == most)
    others = tuple((name, format_name(options)) for name, options in own.items() if options != base)
    return base | {"layers": others} if others else base


def _held(weight: HeldWeight) -> dict[str, Any]:
    """The options of one weight's format. Raises Misfit."""
    if weight.ordered:
        raise Misfit("act-order", "its columns belong to groups in an order of their own, and those held follow")
    grouped = weight.columns_of_a_scale != -1
    if weight.kind == "code book":
        name = next((name for name in FP4 if FIXED_GROUPS[name] == weight.group_size), None)
        if name is None or weight.table != E2M1:
            raise Misfit(
                "bits", "its codes are entries of a code book, and of those E2M1's in groups of 16 or 32 are held"
            )
        return {"weights": name}
    if weight.kind == "floats":
        if grouped and weight.group_size == FIXED_GROUPS["mxfp8"]:
            return {"weights": "mxfp8"}  # where its scales are powers of two: `_layers.unpack`
        if grouped:
            raise Misfit(
                "group size", f"its scales are those of {weight.group_size} columns of a row, and fp8's of rows"
            )
        return {"weights": "fp8", "strategy": "channel"}
    if weight.zero_points == "none":
        raise Misfit("minima", "its minima are no whole multiples of its scales, and zero points are integers")
    groups = {"strategy": "group", "group_size": weight.group_size} if grouped else {"strategy": "channel"}
    return {"weights": f"int{weight.bits}", "symmetric": weight.zero_points == "middle", **groups}


def targeted(weight: WeightInfo) -> str:
    """The module whose name a checkpoint's targets are held against."""
    return stored_expert(weight.name) if weight.role == "experts" else module_of(weight)
