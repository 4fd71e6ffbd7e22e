"""What a checkpoint's quantization_config stands for, or why it is not read. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

OWN = "polyquant"  # key for what compressed-tensors has no field for: method, calibration, compute dtype
PLAIN = ("int-quantized", "float-quantized", "naive-quantized")  # weights a byte each
UNREAD = {"kv_cache_scheme": "quantizes the key-value cache", "transform_config": "rotates activations"}
FORMATS: Mapping[tuple[str, int], Mapping[str, tuple[str, ...]]] = {  # (type, bits) -> option -> its formats
    ("int", 4): {"int4": ("pack-quantized",)},
    ("int", 8): {"int8": ("pack-quantized", *PLAIN)},
    ("float", 8): {"fp8": PLAIN},
    ("float", 4): {"mxfp4": ("mxfp4-pack-quantized",), "nvfp4": ("nvfp4-pack-quantized",)},
}


def read_stored(stored: Mapping[str, Any]) -> dict[str, Any]:
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
    own = own_fields(_mapping(stored, OWN) or {"method": "unknown"})
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


def own_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of these options the ones that compressed-tensors has no field for."""
    return {name: values[name] for name in ("method", "samples", "length", "compute_dtype") if name in values}


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
