"""MLX's codes, scales and biases to numbers, in torch on any device, with the roundings that MLX has."""

from __future__ import annotations

import torch
from polyquant.plugin.codes import unpacked_bits
from polyquant.plugin.floats import e2m1_numbers, e4m3_numbers, e8m0_numbers
from torch import Tensor

from polyquant_mlx.formats import Format


def decode(codes: Tensor, scales: Tensor, biases: Tensor | None, form: Format, dtype: torch.dtype) -> Tensor:
    """Rows as numbers of `dtype`, (rows, columns). codes: uint8 (rows, bytes); scales, biases: (rows, groups).

    Affine numbers are computed in `dtype` where scales have it, as MLX does, and in float32 else. Floats of a few bits
    are exact in every dtype but float16, which does not reach as far as E8M0 scales.
    """
    if form.mode == "affine":
        assert biases is not None
        own = scales.dtype if scales.dtype == dtype else torch.float32
        values = unpacked_bits(codes, form.bits).to(own).unflatten(1, (-1, form.group_size))
        return values.mul_(scales.to(own)[..., None]).add_(biases.to(own)[..., None]).flatten(1).to(dtype)
    factor = 1.0
    if form.bits == 4:
        values = e2m1_numbers(codes)
    else:
        values, factor = e4m3_numbers(codes.view(torch.float8_e4m3fn))
    steps = scale_numbers(scales, form) * factor
    return values.unflatten(1, (-1, form.group_size)).mul_(steps[..., None]).flatten(1).to(dtype)


def scale_numbers(scales: Tensor, form: Format) -> Tensor:
    """What the scales of floats stand for, float32 (rows, groups)."""
    return scales.view(torch.float8_e4m3fn).float() if form.mode == "nvfp4" else e8m0_numbers(scales)
