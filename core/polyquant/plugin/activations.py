"""Inputs of layers as kernels with rounded activations see them, in plain torch: emulation. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
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
    multiplied with.
    """
    if not needs_gradient(inputs):
        return _rounded(inputs, how, scale)
    straight: Tensor = _Straight.apply(inputs, how, scale)
    return straight


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
            owner = loaded.model.get_submodule(module_of(layer))
            stack = loaded.model.get_submodule(layer.name)
            module, owner.rounds_activations = getattr(stack, "like", stack), True
        else:
            module = loaded.model.get_submodule(module_of(layer))
        if not isinstance(module, PackedLinear):
            raise BrokenBackend(
                f"{loaded.backend.name}: activations_of gives {how} for {layer.name}, and {type(module).__name__} is "
                "no PackedLinear, whose inputs can be rounded"
            )
        module.rounding = partial(_of_layer, how)
        formats[how.name] = None
    if left:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        loaded.notes.append(f"activations of {', '.join(left[:SHOWN])}{more} are not rounded: the format has no way to")
    return ", ".join(formats)


def _of_layer(how: Activations, layer: PackedLinear, inputs: Tensor) -> Tensor:
    return rounded(inputs, how, layer.static_scale)


class _Straight(torch.autograd.Function):  # type: ignore[misc]  # torch is not typed here
    @staticmethod
    def forward(_: Any, inputs: Tensor, how: Activations, scale: Tensor | None) -> Tensor:
        return _rounded(inputs, how, scale)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


def _rounded(inputs: Tensor, how: Activations, scale: Tensor | None) -> Tensor:
    if not inputs.numel():
        return inputs
    features = inputs.shape[-1]
    columns = how.columns or features
    blocks = functional.pad(inputs.detach().float(), (0, -features % columns)).unflatten(-1, (-1, columns))
    scales = _scales(blocks, how, None if scale is None else _or_one(scale.detach().float().max()))
    numbers = _in_codes(blocks / scales, how).mul_(scales)
    return numbers.flatten(-2)[..., :features].to(inputs.dtype)


def _scales(blocks: Tensor, how: Activations, fixed: Tensor | None) -> Tensor:
    """What codes are multiplied with, float32 (..., groups, 1), or () where one is `fixed`."""
    largest = blocks.abs().amax(-1, keepdim=True)
    if how.most:
        largest = largest.clamp_max(how.most)
    if how.scales == "e8m0":
        if how.exponents == "ceil":
            exponents = (largest / LARGEST[how.codes]).log2().ceil()
        else:
            parts = torch.frexp(largest)
            exponents = parts.exponent - 1 - OWN_EXPONENT[how.codes]
            exponents = exponents + (parts.mantissa >= ROUNDS_UP) * (how.exponents == "even")
        powers = torch.exp2(exponents.float().clamp(-E8M0_BIAS, E8M0_BIAS))
        return torch.where(largest > 0, powers if fixed is None else powers * fixed, 1.0)
    if how.scales == "e4m3":
        outer = _or_one(largest.amax() / (LARGEST[how.codes] * MOST_E4M3)) if fixed is None else fixed
        inner = (largest / LARGEST[how.codes] / outer).clamp(LEAST_E4M3, MOST_E4M3).to(torch.float8_e4m3fn)
        return inner.float() * outer
    return _or_one(largest / LARGEST[how.codes]) if fixed is None else fixed


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
