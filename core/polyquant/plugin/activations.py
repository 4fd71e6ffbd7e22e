"""Inputs of layers as kernels with rounded activations see them, in plain torch: emulation. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from polyquant.activations import Activations
from polyquant.errors import BrokenBackend
from polyquant.loaded import LoadedModel
from polyquant.modules import module_of
from polyquant.packed_weights.frozen import PackedLinear, needs_gradient
from polyquant.plugin.floats import E2M1, E8M0_BIAS, MOST_E2M1, MOST_E4M3, e2m1_codes
from polyquant.types import WeightInfo

LEAST_E4M3 = 2.0**-9
LARGEST = {"e2m1": MOST_E2M1, "e4m3": MOST_E4M3, "int8": 127.5}
"""What the largest number of a block becomes; of int8 half of 255 steps, as llm-compressor has it."""
OWN_EXPONENT = {"e2m1": 2, "e4m3": 8}
"""Of the codes' largest numbers."""
ROUNDS_UP = 1.75 / 2
"""Mantissas (of 1/2 to 1) that E2M1's precision rounds to the next power of two."""
SHOWN = 3  # names of layers in a note


def rounded(inputs: Tensor, how: Activations, scale: Tensor | None = None) -> Tensor:
    """`inputs` (..., features) rounded to a format, in their dtype; the gradient passes as if they were not.

    scale: of all blocks, float32, where a checkpoint has one; of NVFP4 and MX formats what the scales of blocks are
    multiplied with, or divided by.
    """
    return straight_through(lambda values: _rounded(values, how, scale), inputs)


def straight_through(round_values: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """round_values(inputs), whose gradient passes as if they were not rounded."""
    if not needs_gradient(inputs):
        return round_values(inputs)
    rounded_inputs: Tensor = _Straight.apply(inputs, round_values)
    return rounded_inputs


def emulate(loaded: LoadedModel, weights: Mapping[str, WeightInfo]) -> str:
    """Let the quantized layers of a model round their inputs; the formats' names, and a note on what stays as it was.

    weights: by name, those that the load settled. Raises BrokenBackend for a module that cannot be told to.
    """
    formats: dict[str, None] = {}
    left = []
    for layer in [each for each in loaded.initial_layers if each.quantized and each.role != "embedding"]:
        how = loaded.config.activations_of(weights[layer.name]) if layer.name in weights else None
        if how is None:
            left.append(layer.name)
            continue
        if layer.role == "experts":
            stack = loaded.model.get_submodule(layer.name)
            module = getattr(stack, "like", stack)
        else:
            module = loaded.model.get_submodule(module_of(layer))
        if not isinstance(module, PackedLinear):
            raise BrokenBackend(
                f"{loaded.backend.name}: activations_of gives {how} for {layer.name}, and {type(module).__name__} is "
                "no PackedLinear, whose inputs can be rounded"
            )
        module.rounding = of_layer(how)
        formats[how.name] = None
    if left:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        loaded.notes.append(f"activations of {', '.join(left[:SHOWN])}{more} are not rounded: the format has no way to")
    return ", ".join(formats)


def of_layer(how: Activations) -> Callable[[PackedLinear, Tensor], Tensor]:
    """What a layer's `rounding` is, for it to round its inputs so: by its `static_scale`, where it has one."""
    return lambda layer, inputs: rounded(inputs, how, layer.static_scale)


class _Straight(torch.autograd.Function):  # type: ignore[misc]  # torch is not typed here
    @staticmethod
    def forward(_: Any, inputs: Tensor, round_values: Callable[[Tensor], Tensor]) -> Tensor:
        return round_values(inputs)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _rounded(inputs: Tensor, how: Activations, scale: Tensor | None) -> Tensor:
    if not inputs.numel():
        return inputs
    features = inputs.shape[-1]
    columns = how.columns or features
    numbers = inputs.detach() if how.computed == "inputs" else inputs.detach().float()
    blocks = functional.pad(numbers, (0, -features % columns)).unflatten(-1, (-1, columns))
    fixed = None if scale is None else _or_one(scale.detach().float().max())
    scales = _scales(blocks, how, fixed)
    numbers = _in_codes(blocks / scales, how).mul_(scales)
    return numbers.flatten(-2)[..., :features].to(inputs.dtype)


def _scales(blocks: Tensor, how: Activations, fixed: Tensor | None) -> Tensor:
    """What codes are multiplied with, (..., groups, 1), or () where one is `fixed`."""
    largest = blocks.abs().amax(-1, keepdim=True)
    if how.most:
        largest = largest.clamp_max(how.most)
    if how.scales == "e8m0":
        if how.exponents == "ceil":
            parts = torch.frexp(largest.float() / LARGEST[how.codes])
            exponents = parts.exponent - (parts.mantissa == 0.5).int()  # a logarithm would be rounded itself
        else:
            parts = torch.frexp(largest.float())
            exponents = parts.exponent - 1 - OWN_EXPONENT[how.codes]
            exponents = exponents + (parts.mantissa >= ROUNDS_UP) * (how.exponents == "even")
        powers = torch.exp2(exponents.float().clamp(-E8M0_BIAS, E8M0_BIAS))
        return torch.where(largest > 0, powers if fixed is None else powers * fixed, 1.0)
    if how.scales == "e4m3":
        outer = _or_one(largest.amax().float() / (LARGEST[how.codes] * MOST_E4M3)) if fixed is None else fixed
        divides = how.outer == "divides" and fixed is not None
        inner = (largest / LARGEST[how.codes]).float()
        inner = (inner * outer if divides else inner / outer).clamp(LEAST_E4M3, MOST_E4M3)
        inner = inner.to(torch.float8_e4m3fn).float()
        return inner / outer if divides else inner * outer
    return _or_one(largest / LARGEST[how.codes]) if fixed is None else fixed.to(blocks.dtype)


def _in_codes(numbers: Tensor, how: Activations) -> Tensor:
    """The nearest numbers that the codes have."""
    if how.codes == "e2m1":
        return torch.tensor(E2M1, device=numbers.device)[e2m1_codes(numbers).int()]
    if how.codes == "e4m3":
        return numbers.clamp_(-MOST_E4M3, MOST_E4M3).to(torch.float8_e4m3fn).float()
    return numbers.round_().clamp_(-128, 127)


def _or_one(scales: Tensor) -> Tensor:
    """1 where a scale is zero."""
    return torch.where(scales > 0, scales, torch.ones_like(scales))
