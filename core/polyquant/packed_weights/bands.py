"""Weights that are rounded some rows at a time: rounding holds up to 25 copies of what it rounds. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import ceil, prod
from typing import Any, Protocol

import torch
from torch import Tensor

BAND_WEIGHTS = {"cpu": 2**18, "other": 2**24}
"""Weights rounded at a time. CPU: 1 MiB of float32, which the copies multiply."""


class Rows(Protocol):
    """A tensor, or one that is read as its rows are asked for."""

    @property
    def shape(self) -> Any: ...
    @property
    def device(self) -> Any: ...
    def __getitem__(self, rows: slice, /) -> Tensor: ...


def in_bands(
    weight: Rows, rounded: Callable[[Tensor], Mapping[str, Tensor]], *, multiple: int = 1, parts: int = 1
) -> dict[str, Tensor]:
    """The tensors that `rounded` makes of a weight (rows, ...), as of all its rows at once.

    rounded: (some rows) -> tensors by name, whose first axis goes along with the rows. multiple: of how many rows each
    band but the last consists, where so many rows make one of a tensor's. parts: of a usual band that are taken one
    after the other, where rounding holds the most copies.
    """
    rows, whole, ends = weight.shape[0], dict[str, Tensor](), dict[str, int]()
    for band in bands_of(weight, multiple, parts):
        if len(band) == rows:
            return dict(rounded(band))
        for name, piece in rounded(band).items():
            if name not in whole:
                whole[name] = piece.new_empty((ceil(rows * len(piece) / len(band)), *piece.shape[1:]))
            end = ends.get(name, 0) + len(piece)
            whole[name][end - len(piece) : end] = piece
            ends[name] = end
    return whole


def bands_of(weight: Rows, multiple: int = 1, parts: int = 1) -> Iterator[Tensor]:
    """A weight's rows, a multiple of so many at a time; parts: see `in_bands`."""
    rows, *others = weight.shape
    wanted = BAND_WEIGHTS["cpu" if weight.device.type == "cpu" else "other"] // (parts * max(1, prod(others)))
    step = ceil(max(1, wanted) / multiple) * multiple
    return (weight[start : start + step] for start in range(0, rows, step))


def largest(weight: Rows) -> Tensor:
    """The largest of its numbers without their signs, () float32; of finite numbers."""
    edges = [edge for band in bands_of(weight) for edge in band.aminmax()]
    return torch.stack(edges).abs().amax().float()
