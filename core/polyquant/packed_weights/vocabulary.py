"""An embedding and an output head in the packed layout, rounded here: libraries leave both dense. Imports torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polyquant.packed_weights import kernels
from polyquant.packed_weights.bands import Rows, in_bands
from polyquant.packed_weights.format import ROWS
from polyquant.packed_weights.linear import Repacked, RepackedLinear, named
from polyquant.packed_weights.weight import PackedWeight, pack_weight
from polyquant.types import PackedFormat

LARGEST, LEVELS = 127, 15  # codes of 8 bits; steps of 4 bits


def rounded(weight: Rows, layout: PackedFormat) -> PackedWeight:
    """A matrix (rows, columns) in 8 bits, or in 4 with zero points, each rounded to the nearest, in its group.

    Columns that do not fill the last group count as zeros.
    """
    first: list[PackedWeight] = []

    def parts(rows: Tensor) -> dict[str, Tensor]:
        packed = _rounded(rows, layout)
        if not first:
            first.append(packed)
        return packed.parts

    whole = in_bands(weight, parts, multiple=ROWS)
    return replace(first[0], shape=tuple(weight.shape), **whole)


def _rounded(weight: Tensor, layout: PackedFormat) -> PackedWeight:
    group = layout.group_size
    rows, columns = weight.shape
    groups = nn.functional.pad(weight.detach().float(), (0, -columns % group)).view(rows, -1, group)
    if layout.kind == "int8":
        scales = (groups.abs().amax(2) / LARGEST).half()
        codes = _codes(groups, scales, 0, -LARGEST, LARGEST).to(torch.int8)
        return pack_weight(codes.view(rows, -1)[:, :columns], scales, group)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((high - low) / LEVELS).half()
    zeros = _codes(-low[..., None], scales, 0, 0, LEVELS)[..., 0]
    codes = _codes(groups, scales, zeros[..., None], 0, LEVELS).to(torch.uint8)
    return pack_weight(codes.view(rows, -1)[:, :columns], scales, group, zeros=zeros)


def _codes(values: Tensor, scales: Tensor, zeros: Any, low: int, high: int) -> Tensor:
    steps = scales.float()[..., None].clamp(min=torch.finfo(torch.float16).smallest_normal * 2**-10)
    return ((values / steps).round() + zeros).clamp(low, high)


class RepackedEmbedding(Repacked):
    """Rows of a packed table for token ids, (...) to (..., embedding_dim); only those rows are decoded."""

    def __init__(self, weight: PackedWeight, dtype: torch.dtype, scheme: str, bits: float, scale: Any = None) -> None:
        """dtype: of what it answers. scheme, bits: what the weights are called. scale: Gemma's factor, or None."""
        super().__init__()
        for name, part in named(weight).items():
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        self._hold(weight, scheme, bits)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.dtype = dtype
        self.register_buffer("embed_scale", scale, persistent=False)
        self.eval()

    def forward(self, input: Tensor) -> Tensor:
        """input: integers of any shape (...), from 0 to num_embeddings - 1. Raises IndexError for others."""
        rows = rows_of(*self._as_multiplied(), input.reshape(-1)).to(self.dtype).view(*input.shape, self.embedding_dim)
        return rows if self.embed_scale is None else rows * self.embed_scale.to(self.dtype)

    def dequantize(self) -> Tensor:
        """The table, float32 (num_embeddings, embedding_dim)."""
        return self.packed.decode()

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.scheme}"


def rows_of(weight: PackedWeight, struct: Any, index: Tensor) -> Tensor:
    """Some rows of a weight by their numbers, float32 (numbers, in_features). Raises IndexError for one that is not.

    struct: for the kernels; None: plain torch.
    """
    count, rows = len(index), weight.shape[0]
    if count and not 0 <= int(index.min()) <= int(index.max()) < rows:
        raise IndexError(f"index out of range: rows go from 0 to {rows - 1}")
    if struct is None:
        return weight.decode_rows(index)
    out = torch.empty(count, weight.padded[1])
    wanted = index.long().contiguous()
    library = kernels.functions()
    kernels.require(library.pq_rows(kernels.address_of(struct), wanted.data_ptr(), count, out.data_ptr(), 0))
    return weight.by_inputs(out)


def tied_head(embedding: RepackedEmbedding, bias: Tensor | None) -> RepackedLinear:
    """An output head that multiplies with the embedding's own tensors."""
    head = RepackedLinear(embedding.packed, bias, embedding.scheme, embedding.bits)
    head.is_tied = True
    return head
