"""hqq's search for zero points some groups at a time: the library's holds eight copies of a weight in float32."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from hqq.core import optimize
from hqq.core.quantize import Quantizer
from torch import Tensor

SEARCHED_WEIGHTS = 2**18  # at a time
USUAL = inspect.signature(optimize.optimize_weights_proximal_legacy).parameters["opt_params"].default
BY_LIBRARY = Quantizer.optimize_weights


@contextmanager
def searching_in_bands() -> Iterator[None]:
    """Within it the library searches so, where that is the same: on the CPU, with groups along in_features."""
    Quantizer.optimize_weights = staticmethod(optimized)
    try:
        yield
    finally:
        Quantizer.optimize_weights = BY_LIBRARY


@torch.inference_mode()
def optimized(
    tensor: Tensor, scale: Tensor, zero: Tensor, min_max: Sequence[int], axis: int, device: str, **more: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, zeros), float32, as the library finds them: it stops where the mean error of all does not shrink.

    tensor: (groups, group_size), float32. scale, zero: (groups, 1).
    """
    if axis != 1 or tensor.device.type != "cpu" or torch.device(device).type != "cpu" or more:
        return BY_LIBRARY(tensor=tensor, scale=scale, zero=zero, min_max=min_max, axis=axis, device=device, **more)
    step, least = max(1, SEARCHED_WEIGHTS // tensor.shape[1]), torch.inf
    bands = [slice(start, start + step) for start in range(0, len(tensor), step)]
    whole = torch.empty_like(tensor)
    for _ in range(USUAL["iters"]):
        found = torch.empty_like(zero)
        for band in bands:
            weight = tensor[band]
            decoded, _, found[band], _ = optimize.optimize_weights_proximal_legacy_step(
                weight, scale[band], zero[band], min_max, USUAL["beta"], USUAL["lp_norm"], axis
            )
            torch.sub(weight, decoded, out=whole[band]).abs_()
        zero, error = found, whole.mean().item()
        if error >= least:
            break
        least = error
    for band in bands:
        whole[band] = (tensor[band] * scale[band] + zero[band]).round_().clamp_(*min_max)
    return whole, scale, zero
