"""A linear layer and an embedding whose weights stay packed; each forward pass decodes what it uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from polyquant.plugin.layers import PackedLinear, frozen_linear, rows_at_a_time
from torch import Tensor, nn

from polyquant_mlx._decode import decode
from polyquant_mlx.formats import Format

PARTS = ("weight", "scales", "biases")
"""Codes, uint8 (rows, bytes); scales and, of affine, biases (rows, groups)."""


class MlxLinear(PackedLinear):
    """y = x W^T + b. Tensors: PARTS, and a bias."""

    form: Format

    def __init__(self, linear: Any, form: Format, tensors: Mapping[str, Tensor]) -> None:
        """linear: what has its in_features and out_features."""
        super().__init__(linear, tensors)
        self.form = form

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in_features). Returns (..., out_features)."""
        return frozen_linear(input, partial(self.pieces, input.dtype), self.bias)

    def pieces(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight, some rows at a time, computed in `dtype` where scales have it."""
        step = rows_at_a_time(self.in_features, self.weight.device)
        for start in range(0, self.out_features, step):
            yield numbers(self, slice(start, start + step), dtype)

    def dequantize(self) -> Tensor:
        """The weight, float32 (out_features, in_features)."""
        return torch.cat(list(self.pieces(torch.float32)))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.form.name}"


class MlxEmbedding(nn.Module):
    """Rows of the table for token ids, (...) to (..., embedding_dim); only those rows are decoded."""

    def __init__(self, embedding: Any, form: Format, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """embedding: what has its sizes, and Gemma's factor. dtype: of what it answers."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.form, self.dtype = form, dtype
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.register_buffer("embed_scale", getattr(embedding, "embed_scale", None), persistent=False)
        self.eval()

    def forward(self, input: Tensor) -> Tensor:
        """input: integers of any shape (...), from 0 to num_embeddings - 1."""
        rows = numbers(self, input.reshape(-1), self.dtype).view(*input.shape, self.embedding_dim)
        return rows if self.embed_scale is None else rows * self.embed_scale.to(self.dtype)

    def dequantize(self) -> Tensor:
        """The table, float32 (num_embeddings, embedding_dim)."""
        return numbers(self, slice(None), torch.float32)

    def as_head(self, bias: Any) -> MlxLinear:
        """An output head that multiplies with this table's own tensors."""
        shape = nn.Linear(self.embedding_dim, self.num_embeddings, bias=False, device="meta")
        head = MlxLinear(shape, self.form, {} if bias is None else {"bias": bias.detach()})
        for name in PARTS:
            if name in self._parameters:
                head._parameters[name] = self._parameters[name]
        return head

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.form.name}"


def numbers(module: Any, rows: Any, dtype: torch.dtype) -> Tensor:
    """Some rows of a module's weight. rows: a slice, or their numbers."""
    parts = module._parameters
    biases = parts.get("biases")
    return decode(
        parts["weight"].detach()[rows], parts["scales"].detach()[rows],
        None if biases is None else biases.detach()[rows], module.form, dtype,
    )  # fmt: skip


def share_tied(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Let each head that is tied to a packed embedding multiply with its tensors. tied: tensor -> its origin."""
    for name, origin in tied.items():
        home = model.get_submodule(origin.rpartition(".")[0])
        if isinstance(home, MlxEmbedding) and origin.endswith(".weight"):
            head = name.rpartition(".")[0]
            model.set_submodule(head, home.as_head(getattr(model.get_submodule(head), "bias", None)))
