"""A linear layer whose weight stays FP8; each forward pass dequantizes it, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from polyquant.plugin.floats import e2m1_numbers
from polyquant.plugin.layers import PackedLinear, frozen_linear, rows_at_a_time
from torch import Tensor, float32, nn

from polyquant_fp8._decode import dequantize
from polyquant_fp8.options import Float8Options
from polyquant_fp8.planning import FP4_GROUP

KERNEL = "torch dequantize and matmul"


class Fp8Linear(PackedLinear):
    """weight e4m3 (out_features, in_features), scales () or one for each block; names as in transformers."""

    compute_dtype = float32
    """Where PEFT finds it, it makes adapters of this dtype instead of the weight's."""

    def __init__(
        self, linear: nn.Linear, weight: Tensor, scales: Tensor, config: Float8Options,
        activation_scale: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(linear, {"weight": weight, config.scale_name: scales})
        self.block, self.scale_name = config.block, config.scale_name
        self.bias = linear.bias
        if activation_scale is not None:  # activations are rounded with it where that is emulated
            self.activation_scale = nn.Parameter(activation_scale, requires_grad=False)

    @property
    def scales(self) -> Tensor:
        """What its blocks are multiplied by, under the name that the format has for it."""
        return self._parameters[self.scale_name].detach()  # of an expert no parameter, but a view

    @property
    def static_scale(self) -> Tensor | None:
        """`activation_scale`."""
        found = self._parameters.get("activation_scale")
        return None if found is None else found.detach()

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) to (..., out_features), in the dtype of the input."""
        return frozen_linear(self.inputs(input), self._pieces, self.bias)

    def dequantize(self) -> Tensor:
        """The weight, float32 (out_features, in_features)."""
        return torch.cat(list(self._pieces()))

    def _pieces(self) -> Iterator[Tensor]:
        """The rows as numbers, whole blocks of rows at a time."""
        weight, scales = self.weight.detach(), self.scales
        rows = rows_at_a_time(self.in_features, weight.device)
        if self.block is None:
            yield from (dequantize(part, scales, None) for part in weight.split(rows))
            return
        blocks = max(1, rows // self.block[0])
        for part, own in zip(weight.split(blocks * self.block[0]), scales.split(blocks), strict=True):
            yield dequantize(part, own, self.block)


class Fp4Linear(PackedLinear):
    """An expert in FP4. weight: two E2M1 in a byte (out_features, in_features / 2), scales: of 32 columns each."""

    compute_dtype = float32

    def __init__(self, linear: nn.Module, weight: Tensor, scales: Tensor) -> None:
        super().__init__(linear, {"weight": weight, "weight_scale_inv": scales})

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) to (..., out_features), in the dtype of the input."""
        return frozen_linear(self.inputs(input), self._pieces, self.bias)

    def dequantize(self) -> Tensor:
        """The weight, float32 (out_features, in_features)."""
        return torch.cat(list(self._pieces()))

    def _pieces(self) -> Iterator[Tensor]:
        codes, scales = (self._parameters[name].detach() for name in ("weight", "weight_scale_inv"))
        rows = rows_at_a_time(self.in_features, codes.device)
        for part, own in zip(codes.split(rows), scales.split(rows), strict=True):
            numbers = e2m1_numbers(part.view(torch.uint8)).unflatten(1, (-1, FP4_GROUP))
            yield (numbers * own.float().unsqueeze(-1)).flatten(1)
