"""A linear layer whose weight stays packed; each forward pass dequantizes it, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from polyquant.plugin.activations import straight_through
from polyquant.plugin.layers import frozen_linear
from torch import Tensor, nn

from polyquant_fouroversix._decode import dequantize, rounded
from polyquant_fouroversix.options import FouroversixOptions


class FouroversixLinear(nn.Linear):
    """weight: codes, uint8 (rows, columns / 2); scales; amax (1,); padded as in the library. A Linear, for PEFT.

    The library's own layer gives no gradient without a dense copy of the weight, and dequantizes 6 to 15 times slower.
    """

    weight: Tensor  # type: ignore[assignment]
    scales: Tensor
    amax: Tensor

    def __init__(self, linear: nn.Linear, config: FouroversixOptions, tensors: Mapping[str, Tensor]) -> None:
        """linear: gives sizes and bias; tensors: weight, scales and amax, checked."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.config = linear.in_features, linear.out_features, config
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.bias = linear.bias
        self.eval()

    def pieces(self) -> Iterator[Tensor]:
        """The weight without its padding, float32, some rows at a time."""
        done = 0
        for numbers in dequantize(self.weight, self.scales, self.amax, self.config):
            if done < self.out_features:
                yield numbers[: self.out_features - done, : self.in_features]
            done += len(numbers)

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) to (..., out_features), in the dtype of the input."""
        if self.config.quantize_activations:
            input = straight_through(partial(rounded, config=self.config), input)
        return frozen_linear(input, self.pieces, self.bias)
