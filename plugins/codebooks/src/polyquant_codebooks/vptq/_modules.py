"""A VPTQ layer: vectors from tables, permuted, scaled and shifted by columns. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polyquant_codebooks._decode import require_below, require_permutation, stream, unsigned
from polyquant_codebooks._modules import CodebookLinear
from polyquant_codebooks.options import CodebookOptions
from polyquant_codebooks.vptq.options import VptqLayer, VptqOptions


class VptqLinear(CodebookLinear):
    """Column c of a group, rows v r to v r + v - 1: vector index[r, c] of the group's table."""

    own: VptqLayer

    @classmethod
    def parts(cls, config: CodebookOptions, name: str, linear: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Tables may be of any floating point."""
        expected = super().parts(config, name, linear, tensors)
        return {
            short: part._replace(dtype="float") if part.dtype == "float16" else part for short, part in expected.items()
        }

    def configure(self, config: CodebookOptions, name: str) -> None:
        assert isinstance(config, VptqOptions)
        self.own = config.of_module(name)
        main, residual = self._indices()
        require_below("indices", main, self.own.num_centroids[1])
        if residual is not None:
            require_below("indices (of res_centroids)", residual, self.own.num_res_centroids[1])
        if self.own.has_outliers:
            require_below("outlier_indices", unsigned(self._of("outlier_indices")), self.own.num_centroids[0])
        if self.own.enable_perm:
            require_permutation("perm", unsigned(self._of("perm")), self.in_features)

    def inner(self) -> Tensor:
        own, (main, residual) = self.own, self._indices()
        weight = _columns(self._of("centroids.weight"), main, own.vector_lens[1])
        if residual is not None:
            weight = weight + _columns(self._of("res_centroids.weight"), residual, own.vector_lens[1])
        weight = weight[: self.out_features]
        if own.has_outliers:
            indices = unsigned(self._of("outlier_indices"))
            first = _columns(self._of("outlier_centroids.weight"), indices, own.vector_lens[0])
            weight = torch.cat([first[: self.out_features], weight], 1)
        if own.enable_perm:
            weight = weight[:, unsigned(self._of("perm")).argsort()]
        if own.enable_norm:
            weight = weight * self._of("weight_scale").float() + self._of("weight_bias").float()
        return weight

    def _indices(self) -> tuple[Tensor, Tensor | None]:
        """Into the main table, and into the second one: int64 (groups, vectors, columns)."""
        own = self.own
        both = stream(self._of("indices"), own.index_bits + own.residual_bits, own.group_size)
        main = both & ((1 << own.index_bits) - 1)
        return main, (both >> own.index_bits if own.residual_bits else None)


def _columns(table: Tensor, indices: Tensor, length: int) -> Tensor:
    """The columns of all groups, float32 (vectors * length, groups * columns).

    table: (groups, entries * length). indices: (groups, vectors, columns).
    """
    groups, vectors, columns = indices.shape
    entries = table.float().view(groups, -1, length)
    found = torch.stack([each[index.reshape(-1)] for each, index in zip(entries, indices, strict=True)])
    return found.view(groups, vectors, columns, length).permute(1, 3, 0, 2).reshape(vectors * length, -1)
