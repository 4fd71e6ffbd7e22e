"""A linear layer in sinq's format: how it is made, what it stores, how it multiplies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from polyquant.errors import ModelError
from polyquant.plugin import LayerInfo, resolved_dtype
from polyquant.plugin.layers import (
    PackedWeight,
    Quantized,
    describe,
    frozen_linear,
    layer_tensors,
    pack_weight,
    prepare_for_training,
    take_bias,
)
from sinq.quantizer import Quantizer
from torch import Tensor

from polyquant_sinq.options import SinqOptions
from polyquant_sinq.planning import IN_INT32, layout

__all__ = ["pack", "prepare_for_training"]  # freezing is all that adapters need
KERNEL = "dequantize and torch matmul"
HALF = 128  # what codes of 8 bits are made less by: the packed layout has them signed


class SinqLinear(torch.nn.Linear):
    """y = x W^T + b, with W = (codes - zero) * scale * columns, dequantized in each forward pass.

    `weight` holds the packed codes. A Linear, as PEFT wants it. sinq's own module keeps its tensors outside of torch's
    buffers, where `to` does not find them, and unpacks 4 bit by division in float16.
    """

    def __init__(
        self, linear: torch.nn.Linear, config: SinqOptions, dtype: torch.dtype, tensors: Mapping[str, Tensor]
    ) -> None:
        """linear: gives sizes and bias; tensors: as `planning.layout` has them, checked."""
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits, self.tile, self.compute_dtype = config.bits, config.group_size, dtype
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.bias = linear.bias
        self.eval()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, (out_features, in_features); computed in float32, as sinq does."""
        rows, columns, size = self.out_features, self.in_features, self.tile
        codes, scale, zero = self.codes().float(), *self.scales_and_zeros()
        if self.columns.dim() == 2:
            weight = ((codes - zero) * scale).view(rows, columns) * self.columns
        else:
            tiles = (rows // size, columns // size)
            scale, zero = (each.view(*tiles, size, 1).transpose(1, 2) for each in (scale, zero))
            by_column = self.columns.view(*tiles, 1, size).transpose(1, 2)
            weight = ((codes.view(tiles[0], size, tiles[1], size) - zero) * scale * by_column).view(rows, columns)
        return weight.to(dtype or self.compute_dtype)

    def codes(self) -> Tensor:
        """Unsigned codes, (groups, group_size)."""
        return unpack(self.weight, self.bits)[: self.out_features * self.in_features // self.tile]

    def scales_and_zeros(self) -> tuple[Tensor, Tensor]:
        """Of the groups, (groups, 1), float16: sinq rounds them so, too."""
        scale = (self.scale * self.scale_step + self.scale_least).view(-1, 1)
        return scale, (self.zero * self.zero_step + self.zero_least).view(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, lambda: [self.dequantize(x.dtype)], self.bias)


def unpack(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes, (groups, group_size), with rows of padding at the end where a word is not full.

    Bits of rows far apart share a word, the first row in the highest bits.
    """
    count = IN_INT32.get(bits, 8 // bits)
    return torch.cat([(codes >> bits * (count - 1 - place)) & (2**bits - 1) for place in range(count)])


def quantize_linear(linear: torch.nn.Linear, config: SinqOptions) -> SinqLinear:
    """A layer that takes the place of `linear`. Raises ModelError where a scale is not finite."""
    weight, dtype = linear.weight.detach(), getattr(torch, resolved_dtype(config))
    codes, meta = Quantizer.quantize(
        weight, None, device=weight.device, compute_dtype=dtype, **config.quantizer_arguments()
    )
    made = {"weight": codes, "columns": meta["scale2"]}
    for name in ("scale", "zero"):
        made[name], made[f"{name}_step"], made[f"{name}_least"], _ = meta[name]
    tensors = {name: tensor.clone() for name, tensor in made.items()}  # sinq gives views and inference tensors
    if not all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point()):
        raise ModelError("its scales are not finite in float16; skip this module")
    return SinqLinear(linear, config, dtype, tensors)


def linear_from_tensors(
    linear: torch.nn.Linear, config: SinqOptions, dtype: torch.dtype, tensors: Mapping[str, Tensor]
) -> SinqLinear:
    """A layer from stored tensors. Raises ModelError where one is missing, or has another shape or dtype."""
    shape = (linear.out_features, linear.in_features)
    expected = layout(shape, config)
    found = layer_tensors(linear, tensors, expected)
    take_bias(linear, found, dtype)
    return SinqLinear(linear, config, dtype, {name: found[name] for name in expected})


def pack(module: SinqLinear) -> PackedWeight:
    """(code - zero) * scale as code * scale + minimum, rounded once to float32; the columns' scales apart."""
    shape = (module.out_features, module.in_features)
    codes, (scales, zeros) = module.codes().to(torch.uint8).view(shape), module.scales_and_zeros()
    least = -zeros.double()
    if module.bits > 4:
        half = HALF if module.bits == 8 else 0
        codes, least = (codes ^ half).view(torch.int8), least + half
    scales, minima = (each.view(shape[0], -1) for each in (scales, (least * scales.double()).float()))
    return pack_weight(codes, scales, module.tile, minima=minima, column_scales=module.columns.view(-1))


def is_rounded_plainly(layer: SinqLinear) -> bool:
    """Whether its columns are not scaled: sinq leaves weights with a kurtosis above 5 as they are."""
    return bool((layer.columns == 1).all())


def describe_layers(model: Any) -> list[LayerInfo]:
    return describe(model, _quantized, skipped=model.config.quantization_config["modules_to_not_convert"])


def _quantized(name: str, module: Any) -> Quantized | None:
    if not isinstance(module, SinqLinear):
        return None
    return Quantized((module.out_features, module.in_features), module.bits, f"sinq{module.bits}", KERNEL)
