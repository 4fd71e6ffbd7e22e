"""The weights a layer computes with, whatever it stores: what it answers to unit vectors. Imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

CHUNK = 256  # unit vectors that go through a layer at a time


def effective_weight(layer: Any, in_features: int, columns: Sequence[int] | None = None, dtype: Any = None) -> Any:
    """Columns of the weight of a linear layer, (out_features, columns), float32 on the CPU.

    columns: which of the in_features; None: all of them. dtype: of the layer's inputs; None: as `input_dtype` says.
    What the layer answers to zero, its bias, is taken away, and what it rounds its inputs to where that is emulated.
    No backend is asked.
    """
    rounding = vars(layer).pop("rounding", None)
    try:
        return _effective_weight(layer, in_features, columns, dtype)
    finally:
        if rounding is not None:
            layer.rounding = rounding


def _effective_weight(layer: Any, in_features: int, columns: Sequence[int] | None, dtype: Any) -> Any:
    device = next((tensor.device for tensor in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))
    zero = torch.zeros(1, in_features, dtype=dtype or input_dtype(layer, torch.float32), device=device)
    chosen = torch.arange(in_features) if columns is None else torch.tensor(list(columns))
    with torch.inference_mode():
        bias = layer(zero)
        rows = []
        for part in chosen.to(device).split(CHUNK):
            units = zero.repeat(len(part), 1)
            units[torch.arange(len(part), device=device), part] = 1
            rows.append((layer(units) - bias).float().cpu())
    return torch.cat(rows).T.clone()


def input_dtype(layer: Any, otherwise: torch.dtype) -> torch.dtype:
    """The dtype of a layer's inputs: of its first floating-point parameter of more than 8 bits, where it has one."""
    numbers = (each.dtype for each in layer.parameters() if each.is_floating_point() and each.itemsize > 1)
    return next(numbers, otherwise)
