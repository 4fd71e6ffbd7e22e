"""A linear layer whose weight stays packed; each forward pass decodes it, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from polyquant.plugin.layers import PackedLinear, frozen_linear, rows_at_a_time
from torch import Tensor

from polyquant_mx._decode import decoded, rotated
from polyquant_mx.formats import Scheme

KERNEL = "torch decode and matmul"
OWN_EXPONENT = 4.0
"""2 to the exponent of E2M1's largest numbers, which OCP's scales are less by, and FP-Quant's are not."""


class MxLinear(PackedLinear):
    """The tensors of `Scheme.parts`, and where a checkpoint has them `column_scales` (in_features), which multiply each
    input, and `input_scale` and `backward_rotation`, which are kept for saving.

    E4M3 codes are held as bytes: PEFT makes adapters of a floating point `qweight`'s dtype.
    """

    qweight: Tensor
    scales: Tensor

    def __init__(self, linear: Any, scheme: Scheme, tensors: Mapping[str, Tensor]) -> None:
        """linear: what has its in_features and out_features. tensors: by name, a bias among them."""
        held = {name: tensor.detach() for name, tensor in tensors.items()}
        super().__init__(linear, {**held, "qweight": held["qweight"].view(torch.uint8)})
        self.scheme = scheme

    def part(self, name: str) -> Tensor | None:
        """A tensor of the layer; None where it has none of that name."""
        found: Tensor | None = self._parameters.get(name)
        return None if found is None else found.detach()

    def pieces(self) -> Iterator[Tensor]:
        """The weight that rotated inputs are multiplied with: float32 (rows, in_features), some rows at a time."""
        step = max(2, rows_at_a_time(self.in_features, self.qweight.device) // 2 * 2)
        for start in range(0, self.out_features, step):
            yield decoded(self, start, min(start + step, self.out_features))

    def dequantize(self) -> Tensor:
        """The weight, float32 (out_features, in_features)."""
        weight, rotation = torch.cat(list(self.pieces())), self.part("rotation")
        return weight if rotation is None else rotated(weight, rotation.float().T)

    @property
    def static_scale(self) -> Tensor | None:
        """ModelOpt's `input_scale`; of rotated inputs what FP-Quant's `act_global_scale` comes to."""
        given = self.part("input_scale")
        if not self.scheme.rotation:
            return given
        outer = self.part("outer_scale") if given is None else given
        assert outer is not None  # a rotated layer has one
        return (OWN_EXPONENT if self.scheme.scales == "e8m0" else 1.0) / outer.float()

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) to (..., out_features), in the dtype of the input."""
        rotation = self.part("rotation")
        if rotation is not None:
            input = rotated(input, rotation.to(input.dtype))
        return frozen_linear(self.inputs(input), self.pieces, self.bias)
