"""Numbers to MLX's codes, scales and biases: its rules, word for word. Source: mlx/ops and its CPU kernels, 0.32."""

from __future__ import annotations

import torch
from polyquant.plugin.codes import packed_bits
from polyquant.plugin.floats import MOST_E2M1, MOST_E4M3, e2m1_codes, e8m0_bytes, e8m0_numbers, pairs_of_codes
from torch import Tensor

from polyquant_mlx.formats import Format

LEAST_SCALE = 1e-7
LEAST_OF_METAL = 1e-8
NEGATIVE_ZERO = 8  # of E2M1, which MLX writes as zero


def encode(weight: Tensor, form: Format, *, metal: bool = False) -> dict[str, Tensor]:
    """weight: (rows, columns), finite. Returns uint8 `weight` (rows, columns * bits / 8), `scales`, and of affine
    `biases` (rows, groups), in the dtype of `weight`; of other modes scales are uint8.

    metal: by transformers' rule for its Metal kernels, which begins each group at its minimum.
    """
    if form.mode != "affine":
        return _floats(weight.unflatten(1, (-1, form.group_size)), form)
    groups = weight.float().unflatten(1, (-1, form.group_size))
    scales, biases = (_metal_steps if metal else _steps)(groups, form.bits)
    codes = ((groups - biases) / scales).round().clamp(0, 2**form.bits - 1).to(torch.uint8)
    parts = {"scales": scales, "biases": biases}
    return {
        "weight": packed_bits(codes.flatten(1), form.bits),
        **{name: part.squeeze(2).to(weight.dtype) for name, part in parts.items()},
    }


def _steps(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and bias of each group, float32 (rows, groups, 1): the edge that is further from zero is met exactly."""
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    low_is_further = low.abs() > high.abs()
    scales = ((high - low) / (2**bits - 1)).clamp(min=LEAST_SCALE)
    scales = torch.where(low_is_further, scales, -scales)
    edge = torch.where(low_is_further, low, high)
    first = (edge / scales).round()
    at_zero = first == 0
    return torch.where(at_zero, scales, edge / first), torch.where(at_zero, 0.0, edge)


def _metal_steps(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    return ((high - low) / (2**bits - 1)).clamp(min=LEAST_OF_METAL), low


def _floats(groups: Tensor, form: Format) -> dict[str, Tensor]:
    """Codes and scales. A group's step is computed in the dtype of `groups`; of E8M0 it is the next power of two."""
    largest = groups.abs().amax(2)
    wanted = (largest / (MOST_E4M3 if form.bits == 8 else MOST_E2M1)).float()
    if form.mode == "nvfp4":
        numbers = wanted.clamp(max=MOST_E4M3).to(torch.float8_e4m3fn)
        scales, steps = numbers.view(torch.uint8), numbers.float()
    else:
        scales = e8m0_bytes(torch.where(wanted > 0, wanted.log2().ceil(), 0.0))
        steps = e8m0_numbers(scales)
    values = torch.where(steps[..., None] > 0, groups.float() / steps[..., None], 0.0).flatten(1)
    if form.bits == 8:
        codes = values.clamp(-MOST_E4M3, MOST_E4M3).to(torch.float8_e4m3fn).view(torch.uint8)
        return {"weight": codes, "scales": scales}
    codes = e2m1_codes(values, ties="zero")
    return {"weight": pairs_of_codes(torch.where(codes == NEGATIVE_ZERO, 0, codes)), "scales": scales}
