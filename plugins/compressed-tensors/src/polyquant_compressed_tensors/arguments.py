"""What a quantization_config says of weights, and of activations that are rounded while running."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from polyquant.plugin import Activations, activation_formats

if TYPE_CHECKING:
    from polyquant_compressed_tensors.options import CompressedTensorsOptions

Weights = Literal["int4", "int8", "fp8", "mxfp8", "mxfp4", "nvfp4", "sparse"]
"""Of weights. sparse: half of them, in 16 bits, and a mask that says which."""
BITS: Mapping[Weights, int] = {"int4": 4, "int8": 8, "fp8": 8, "mxfp8": 8, "mxfp4": 4, "nvfp4": 4, "sparse": 8}
BLOCK = (128, 128)
Way = Literal["", "dynamic", "static"]
"""Scales of activations. dynamic: found while running, of nvfp4 below a stored one for the whole tensor. static: one
stored number. Empty: activations are not rounded."""
STATIC = ("int8", "fp8")
FIXED_GROUPS: Mapping[str, int] = {"mxfp8": 32, "mxfp4": 32, "nvfp4": 16}
ACTIVATIONS: Mapping[str, Activations] = {
    "int8": activation_formats.INT8, "fp8": activation_formats.FP8, "nvfp4": activation_formats.NVFP4,
    "mxfp8": activation_formats.MXFP8._replace(exponents="even"),
    "mxfp4": activation_formats.MXFP4._replace(exponents="even"),
}  # fmt: skip


def ways(weights: str, strategy: str, *, symmetric: bool) -> dict[Way, dict[str, Any]]:
    """Way -> which activations share a scale beside such weights, and when that is found: as QuantizationArgs say it.

    Activations have the type of the weights.
    """
    size = FIXED_GROUPS.get(weights)
    if size is not None:
        local = weights == "nvfp4"
        return {"dynamic": {"strategy": "tensor_group" if local else "group", "group_size": size,
                            "dynamic": "local" if local else True}}  # fmt: skip
    if weights not in STATIC or not symmetric or strategy == "group":
        return {}
    if strategy == "block":
        return {"dynamic": {"strategy": "group", "group_size": 128, "dynamic": True}}
    return {
        "dynamic": {"strategy": "token", "group_size": None, "dynamic": True},
        "static": {"strategy": "tensor", "group_size": None, "dynamic": False},
    }


def activations_beside(weights: Weights, strategy: str | None, *, symmetric: bool) -> Activations | None:
    """What vLLM's kernels round activations to beside such weights, as 'dynamic' of `ways`; None: there are none."""
    own = ways(weights, strategy or "", symmetric=symmetric).get("dynamic")
    return ACTIVATIONS[weights]._replace(columns=own["group_size"] or 0) if own else None


def rounded_activations(options: CompressedTensorsOptions) -> Activations | None:
    """How layers round theirs, with one stored scale where it is static; None: they do not.

    To the bit as compressed-tensors and transformers, but where these are odd: in an expert they have one scale for all
    tokens, where kernels have one for each, and NVFP4's scales below 2^-10 become 1/8, not 2^-9.
    """
    beside = activations_beside(options.weights, options.strategy, symmetric=options.symmetric)
    if beside is None or not (options.dynamic_activations or options.static_activations):
        return None
    return beside._replace(computed="inputs", outer="divides")


def weight_arguments(options: CompressedTensorsOptions) -> dict[str, Any]:
    """What a config group says of weights, as QuantizationArgs have it."""
    kind = "int" if options.weights.startswith("int") else "float"
    blocks = {"block_structure": list(BLOCK)} if options.strategy == "block" else {}
    return {
        "num_bits": BITS[options.weights], "type": kind, "symmetric": options.symmetric, "strategy": options.strategy,
        "group_size": options.group_size, **blocks,
    }  # fmt: skip


def activation_arguments(options: CompressedTensorsOptions) -> dict[str, Any] | None:
    """What it says of activations beside type and bits, which are those of the weights; None where they stay."""
    way: Way = "dynamic" if options.dynamic_activations else "static" if options.static_activations else ""
    return ways(options.weights, options.strategy or "", symmetric=options.symmetric)[way] if way else None


def read_way(arguments: Mapping[str, Any], weights: Mapping[str, Any]) -> Way:
    """How activations are rounded. weights: their options, as `ways` takes them, and their type.

    Raises ValueError for a way that is not run.
    """
    if not arguments:
        return ""
    name: Weights = weights["weights"]
    there = ways(name, weights["strategy"], symmetric=weights["symmetric"])
    kind, bits = "int" if name.startswith("int") else "float", BITS[name]
    found = {"type": str(arguments.get("type", "int")), "num_bits": arguments.get("num_bits", 8),
             "symmetric": bool(arguments.get("symmetric", True)), "strategy": arguments.get("strategy"),
             "group_size": arguments.get("group_size"), "dynamic": arguments.get("dynamic", False)}  # fmt: skip
    for way, own in there.items():
        if found == {"type": kind, "num_bits": bits, "symmetric": True, **own}:
            return way
    readable = " or ".join(f"{kind}{bits} {_said(own)}" for own in there.values()) or "none"
    raise ValueError(
        f"it rounds activations to {found['type']}{found['num_bits']} {_said(found)} for {name} weights; "
        f"beside these {readable} is run, symmetric"
    )


def _said(own: Mapping[str, Any]) -> str:
    """Such as '(group of 32, dynamic True, symmetric True)'."""
    group = f" of {own['group_size']}" if own["group_size"] else ""
    zero = "" if own.get("symmetric", True) else ", with a zero point"
    return f"({own['strategy']}{group}, dynamic {own['dynamic']}{zero})"
