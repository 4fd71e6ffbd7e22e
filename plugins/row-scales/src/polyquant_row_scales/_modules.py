"""Linear layers and embeddings whose weights stay integers; each product makes numbers of some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from polyquant.plugin import activation_formats
from polyquant.plugin.activations import rounded
from polyquant.plugin.layers import PackedLinear, frozen_linear, rows_at_a_time
from torch import Tensor

from polyquant_row_scales._decode import integers

KERNEL = "torch dequantize and matmul"
ROUNDED = f"{KERNEL}, activations rounded to int8"
ACTIVATIONS = activation_formats.GEMMA


class RowLinear(PackedLinear):
    """W = integers * scale of the row. `weight`: as `integers` takes it; scales under the format's name for them."""

    def __init__(
        self, linear: Any, tensors: Mapping[str, Tensor], scale_name: str, bits: int, dtype: torch.dtype
    ) -> None:
        """linear: says sizes. tensors: weight, scales, and a bias. dtype: of products, where PEFT finds it."""
        super().__init__(linear, tensors)
        self.scale_name, self.bits, self.compute_dtype = scale_name, bits, dtype

    @property
    def scales(self) -> Tensor:
        """(out_features, 1)."""
        return self._parameters[self.scale_name].detach().view(-1, 1)

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) to (..., out_features), in the dtype of the input."""
        return frozen_linear(input, lambda: self.pieces(input.dtype), self.bias)

    def dequantize(self) -> Tensor:
        """The weight, float32 (out_features, in_features)."""
        return torch.cat(list(self.pieces(torch.float32)))

    def pieces(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight, some rows at a time, computed in `dtype`."""
        size = rows_at_a_time(self.in_features, self.weight.device)
        for rows, scales in zip(self.weight.detach().split(size), self.scales.split(size), strict=True):
            yield integers(rows, self.bits, self.in_features).to(dtype) * scales.to(dtype)


class GemmaLinear(RowLinear):
    """With static ranges of activations: inputs and outputs are rounded to int8 times a scale, where that is not 0.

    The gradient passes the rounding as if it were none.
    """

    def __init__(
        self, linear: Any, tensors: Mapping[str, Tensor], scale_name: str, bits: int, dtype: torch.dtype
    ) -> None:
        super().__init__(linear, tensors, scale_name, bits, dtype)
        self.rounds_input = bool(self.input_activation_scale)
        self.rounds_output = bool(self.output_activation_scale)

    @property
    def rounds_activations(self) -> bool:
        """Whether it is more than a weight and a bias."""
        return self.rounds_input or self.rounds_output

    @property
    def kernel(self) -> str:
        """What multiplies."""
        return ROUNDED if self.rounds_activations else KERNEL

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) to (..., out_features), in the dtype of the input."""
        if self.rounds_input:
            input = rounded(input, ACTIVATIONS, self.input_activation_scale)
        output = super().forward(input)
        return rounded(output, ACTIVATIONS, self.output_activation_scale) if self.rounds_output else output


class GemmaEmbedding(torch.nn.Module):
    """An embedding of integers: each row times the scales of its blocks, and the factor of the architecture."""

    def __init__(self, embedding: Any, tensors: Mapping[str, Tensor], bits: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.factor = float(getattr(embedding, "scalar_embed_scale", 1.0))
        self.bits, self.dtype = bits, dtype
        for name, tensor in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        self.eval()

    def forward(self, input: Tensor) -> Tensor:
        """input: numbers of rows, (...). Returns (..., embedding_dim)."""
        flat = input.reshape(-1)
        rows = self._numbers(self.embedding_quantized[flat], self.embedding_scale[flat], self.dtype)
        return (rows * self.factor).to(self.dtype).view(*input.shape, self.embedding_dim)

    def dequantize(self) -> Tensor:
        """The table, float32 (num_embeddings, embedding_dim), without the factor."""
        return self._numbers(self.embedding_quantized.detach(), self.embedding_scale.detach(), torch.float32)

    def _numbers(self, rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        of_columns = scales.repeat_interleave(self.embedding_dim // scales.shape[1], 1)
        return integers(rows, self.bits, self.embedding_dim).to(dtype) * of_columns.to(dtype)
