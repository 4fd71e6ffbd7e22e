"""Products with weights that stay codes.

The CPU kernel of aqlm 1.1.7 is not used: its threads add to the same elements, so with two or more the result is wrong
(random 576 x 1536 layer, outputs of standard deviation 25: greatest error 28), and its backward pass takes transposed
codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from aqlm.utils import _dequantize_weight, unpack_int_data
from polyquant.plugin.layers import frozen_linear, needs_gradient, rows_at_a_time
from torch import Tensor

LOOKUP, DEQUANTIZE = "numba lookup table", "torch dequantize and matmul"
LOOKUP_ROWS = 6
"""Tokens up to which tables of products are faster than dequantizing the layer; as in aqlm."""


def dequantize(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """The weight, (out_features, in_features), in the dtype of the codebooks.

    codes: (out_groups, in_groups, codebooks), signed; codebooks: (codebooks, vectors, out_group_size, in_group_size);
    scales: (out_groups, 1, 1, 1).
    """
    with torch.no_grad():
        bits = codebooks.shape[1].bit_length() - 1
        weight: Tensor = _dequantize_weight(unpack_int_data(codes, bits), codebooks, scales)
        return weight


def multiply(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None, kernel: str) -> Tensor:
    """y = x W^T + b, x (tokens, in_features)."""
    if kernel == LOOKUP and x.shape[0] <= LOOKUP_ROWS and not needs_gradient(x):
        y = torch.stack([_looked_up(row, codes, codebooks, scales) for row in x])
        return y if bias is None else y + bias
    (_, in_groups, _), (_, _, rows, size) = codes.shape, codebooks.shape
    step = max(1, rows_at_a_time(in_groups * size, x.device) // rows)

    def pieces() -> Iterator[Tensor]:
        parts = zip(codes.split(step), scales.split(step), strict=True)
        return (dequantize(part, codebooks, own) for part, own in parts)

    return frozen_linear(x, pieces, bias)


def _looked_up(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """x (in_features,) to (out_features,): products of each group of x with every vector, summed by code."""
    books, vectors, _, size = codebooks.shape
    tables = x.view(-1, size) @ codebooks.view(books * vectors, size).T
    y = torch.empty(codes.shape[0])
    arrays = (tables.view(-1, books, vectors).numpy(), codes.view(torch.uint8).numpy(), y.numpy())
    threads = torch.get_num_threads()
    if threads == 1:
        _compiled(parallel=False)(*arrays)
    else:
        _with_threads(threads, *arrays)
    return y.mul_(scales.view(-1))


def _with_threads(threads: int, *arrays: Any) -> None:
    """As many threads as torch has; numba's own number is put back."""
    import numba

    before = numba.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    try:
        _compiled(parallel=True)(*arrays)
    finally:
        numba.set_num_threads(before)


@cache
def _compiled(*, parallel: bool) -> Callable[..., None]:
    """The lookup for any shape; rows are shared out, so no two threads write the same element."""
    import numba

    def look_up(tables: Any, codes: Any, y: Any) -> None:
        for row in numba.prange(codes.shape[0]):
            total = np.float32(0)
            for group in range(codes.shape[1]):
                for book in range(codes.shape[2]):
                    total += tables[group, book, codes[row, group, book]]
            y[row] = total

    compiled: Callable[..., None] = numba.njit(parallel=parallel, nogil=True)(look_up)
    return compiled
