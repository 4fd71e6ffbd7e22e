"""A dense embedding and output head in 16 bits beside activations in float32: half the bytes of every token.

Plain dense modules otherwise: their weights are parameters that are tied, adapted, trained, moved and saved as any.
Imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from polyquant.packed_weights import kernels
from polyquant.packed_weights.format import COLUMNS, ROWS
from polyquant.packed_weights.frozen import frozen_linear, needs_gradient, product_of_pieces, rows_at_a_time
from polyquant.packed_weights.linear import are_few, by_kernels

HALF_BYTES = 2  # of a weight; somebody may have cast it


class HalfEmbedding(nn.Embedding):  # type: ignore[misc]  # torch is not typed here
    """Rows of a table of 16 bits for token ids, (...) to (..., embedding_dim) of another dtype."""

    def __init__(self, weight: nn.Parameter, dtype: torch.dtype, padding_idx: int | None, scale: Any = None) -> None:
        """weight: (num_embeddings, embedding_dim). dtype: of what it answers. scale: Gemma's factor, or None."""
        super().__init__(*weight.shape, padding_idx, device="meta")
        self.weight = weight
        self.dtype = dtype
        self.register_buffer("embed_scale", scale, persistent=False)
        self.eval()

    def forward(self, input: Tensor) -> Tensor:
        """input: integers of any shape (...)."""
        rows = super().forward(input).to(self.dtype)
        return rows if self.embed_scale is None else rows * self.embed_scale.to(self.dtype)

    def whole(self, dtype: torch.dtype) -> nn.Module:
        """The same in `dtype`: torch's own module where nothing is scaled."""
        weight = nn.Parameter(self.weight.detach().to(dtype), requires_grad=self.weight.requires_grad)
        if self.embed_scale is not None:
            return HalfEmbedding(weight, dtype, self.padding_idx, self.embed_scale)
        plain = nn.Embedding(*weight.shape, self.padding_idx, device="meta")
        plain.weight = weight
        return plain.train(self.training)

    def _apply(self, *arguments: Any, **more: Any) -> Any:
        before = self.weight.dtype
        applied = super()._apply(*arguments, **more)
        if self.weight.dtype != before:  # cast, and its answers with it
            self.dtype = self.weight.dtype
        return applied


class HalfLinear(nn.Linear):  # type: ignore[misc]
    """A linear layer with a weight of 16 bits, which multiplies with inputs of any floating point as they are."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        """weight: (out_features, in_features). bias: (out_features,), or None."""
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight, self.bias = weight, bias
        self.eval()

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in_features), in any floating point. Returns (..., out_features) in it."""
        if self.weight.requires_grad and torch.is_grad_enabled():
            bias = None if self.bias is None else self.bias.to(input.dtype)
            return functional.linear(input, self.weight.to(input.dtype), bias)
        weight = self.weight.detach()
        if needs_gradient(input):
            return frozen_linear(input, partial(_pieces, weight), self.bias, partial(_multiply, weight, self.bias))
        if torch.compiler.is_compiling():
            product: Tensor = half_linear(input, weight, self.bias)
            return product
        return _multiply(weight, self.bias, input)

    def whole(self, dtype: torch.dtype) -> nn.Module:
        """torch's own module with the same weight in `dtype`."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(self.weight.detach().to(dtype), requires_grad=self.weight.requires_grad)
        plain.bias = self.bias
        return plain.train(self.training)


@torch.library.custom_op("polyquant::half_linear", mutates_args=())  # type: ignore[untyped-decorator]
def half_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input @ weight.T + bias, opaque to `torch.compile`: input (..., in_features), in whose dtype it answers."""
    return _multiply(weight, bias, input)


@half_linear.register_fake  # type: ignore[untyped-decorator]
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def _pieces(weight: Tensor) -> Iterator[Tensor]:
    step = rows_at_a_time(weight.shape[1], weight.device)
    return (weight[start : start + step].float() for start in range(0, len(weight), step))


def _multiply(weight: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
    """input @ weight.T + bias, by the kernels where they take it; rows that fill no block of theirs go alone."""
    rows, columns = len(weight) // ROWS * ROWS, weight.shape[1]
    if (
        not rows or columns % COLUMNS or not weight.is_contiguous() or weight.device.type != "cpu"
        or weight.itemsize != HALF_BYTES or kernels.library() is None or not are_few(input)
    ):  # fmt: skip
        return product_of_pieces(input, partial(_pieces, weight), bias)
    inputs, first = input.detach().reshape(-1, columns), None if bias is None else bias.detach()[:rows].float()
    outputs = by_kernels(kernels.dense_struct(weight, rows), inputs, rows, first, "float32")
    if rows < len(weight):
        last = None if bias is None else bias[rows:].to(input.dtype)
        outputs = torch.cat([outputs, functional.linear(inputs, weight[rows:].to(input.dtype), last)], -1)
    return outputs.view(*input.shape[:-1], len(weight))
