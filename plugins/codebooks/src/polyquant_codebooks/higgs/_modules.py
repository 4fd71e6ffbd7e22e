"""A HIGGS layer: inputs are rotated, and multiplied with values of a grid. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from polyquant.errors import ModelError
from torch import Tensor

from polyquant_codebooks._decode import rotated
from polyquant_codebooks._modules import CodebookLinear
from polyquant_codebooks.higgs._decode import rows_of_words
from polyquant_codebooks.higgs.options import HiggsOptions
from polyquant_codebooks.options import CodebookOptions


class HiggsLinear(CodebookLinear):
    """Two neighbouring weights of a row are tables2[code, next code] times the scale of their group."""

    @classmethod
    def parts(cls, config: CodebookOptions, name: str, linear: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Scales and tables are of one floating point of 16 bits."""
        expected = super().parts(config, name, linear, tensors)
        return {
            short: part._replace(dtype="float16 or bfloat16") if part.dtype == "float16" else part
            for short, part in expected.items()
        }

    def configure(self, config: CodebookOptions, name: str) -> None:
        assert isinstance(config, HiggsOptions)
        self.tile, self.group_size, self.hadamard_size = config.tile_of(name), config.group_size, config.hadamard_size
        self.code_bits = config.bits
        kinds = {self._of(short).dtype for short in ("scales", "tables", "tables2")}
        if len(kinds) > 1:
            raise ModelError(f"scales, tables and tables2 are of {len(kinds)} dtypes, {', '.join(map(str, kinds))}")

    def before(self, input: Tensor) -> Tensor:
        filled = torch.nn.functional.pad(input, (0, -self.in_features % self.hadamard_size))
        return rotated(filled, self.hadamard_size)

    def inner(self) -> Tensor:
        codes = rows_of_words(self._of("weight"), self.code_bits, self.tile)
        places = codes[:, ::2] << self.code_bits | codes[:, 1::2]
        values = self._of("tables2").float().view(-1, 2)[places].flatten(1)
        return values * self._of("scales").float().repeat_interleave(self.group_size, 1)

    def dequantize(self) -> Tensor:
        """The weight, float32 (out_features, in_features)."""
        return rotated(self.inner(), self.hadamard_size)[:, : self.in_features]
