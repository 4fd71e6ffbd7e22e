"""A SpQR layer: tiles of three-bit codes, two levels of scales and zero points, and sparse outliers. Imports torch."""

from __future__ import annotations

import torch
from polyquant.errors import ModelError
from torch import Tensor

from polyquant_codebooks._decode import require_below, require_permutation, unsigned
from polyquant_codebooks._modules import CodebookLinear
from polyquant_codebooks.options import CodebookOptions
from polyquant_codebooks.spqr.options import TILE

CODE = 7  # three bits
FIRST_CODE, STATISTIC = 6, 54
"""Bits of a tile's row where its weights begin, and its byte of the tile's statistics."""


class SpqrLinear(CodebookLinear):
    """Of a tile's 16 rows each is a word of 64 bits: scale, zero point, 16 weights, and a byte of four float16."""

    def configure(self, config: CodebookOptions, name: str) -> None:
        offsets = self._of("row_offsets").long()
        if offsets[0] != 0 or bool((offsets.diff() < 0).any()) or int(offsets[-1]) != len(self._of("col_vals")):
            raise ModelError(
                f"row_offsets should grow from 0 to {len(self._of('col_vals'))}, the outliers that there are"
            )
        require_below("col_vals", unsigned(self._of("col_vals")), self.in_features)
        if not bool(torch.isfinite(self._statistics()).all()) or not bool(torch.isfinite(self._outliers()[2]).all()):
            raise ModelError("dense_weights or col_vals hold scales or outliers that are NaN or infinity")
        if len(order := self._order()):
            require_permutation("in_perm", order, self.in_features)

    def inner(self) -> Tensor:
        words = self._words()
        scale_of_scale, scale_of_zero, zero_of_scale, zero_of_zero = self._statistics()[:, :, None].unbind(-1)
        scale = scale_of_scale * ((words & CODE).half() - zero_of_scale)  # each step is rounded to float16
        zero = scale_of_zero * (((words >> 3) & CODE).half() - zero_of_zero)
        shifts = FIRST_CODE + 3 * torch.arange(TILE, device=words.device)
        codes = ((words[..., None] >> shifts) & CODE).half()
        tiles = scale[..., None] * (codes - zero[..., None])  # (tile rows, tile columns, rows, columns)
        weight = tiles.transpose(1, 2).reshape(self.out_features, self.in_features).float()
        rows, columns, values = self._outliers()
        weight.index_put_((rows, columns), values.float(), accumulate=True)
        weight = weight.half().float()
        if not len(order := self._order()):
            return weight
        plain = torch.empty_like(weight)
        plain[:, order] = weight
        return plain

    def _words(self) -> Tensor:
        """(tile rows, tile columns, 16)."""
        return self._of("dense_weights").view(self.out_features // TILE, self.in_features // TILE, TILE)

    def _statistics(self) -> Tensor:
        """Of each tile, float16 (tile rows, tile columns, 4): scales of scales and zero points, zeros of both."""
        parts = ((self._words()[..., ::2] >> STATISTIC) & 0xFF).to(torch.uint8)  # two rows have each byte
        return parts.contiguous().view(torch.float16)

    def _outliers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns and float16 values of what is added to single weights.

        Offsets are of rows, or of blocks of 16 of them, whose entries belong to these in turn, with zeros between.
        """
        entries, offsets = self._of("col_vals"), self._of("row_offsets").long()
        places = torch.arange(len(entries), device=entries.device)
        block = torch.searchsorted(offsets, places, right=True) - 1
        by_rows = len(offsets) == self.out_features + 1
        rows = block if by_rows else block * TILE + (places - offsets[block]) % TILE
        values = ((entries.long() >> 16) & 0xFFFF).to(torch.uint16).view(torch.float16)
        return rows, unsigned(entries), values

    def _order(self) -> Tensor:
        """Which of the inputs each column multiplies; empty where they are in order."""
        return unsigned(self._of("in_perm").view(torch.int16))
