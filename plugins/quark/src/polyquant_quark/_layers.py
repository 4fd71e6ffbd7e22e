"""A Linear module that keeps Quark's packed tensors and multiplies with what they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from polyquant.errors import ModelError
from polyquant.plugin import LayerInfo
from polyquant.plugin.layers import (
    PackedLinear,
    PackedWeight,
    Part,
    Quantized,
    describe,
    layer_tensors,
    pack_weight,
    prepare_for_training,
)
from polyquant.plugin.parts import MOST_EXPONENT
from torch import Tensor

from polyquant_quark.options import QuarkOptions
from polyquant_quark.planning import layout

__all__ = ["pack", "prepare_for_training"]  # freezing is all that adapters need
KERNEL = "dequantize and torch matmul"
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
NIBBLES = {"order": (0, 1, 2, 3, 4, 5, 6, 7), "reorder": (0, 4, 1, 5, 2, 6, 3, 7)}
"""Packing -> where in a word the codes of eight neighbours are, in units of four bits from the lowest."""
ZERO = 8  # the code of int4 that stands for 0 in the packed layout, whose codes have no sign


class QuarkLinear(PackedLinear):
    """A Linear module whose packed weight is dequantized anew in each forward pass, and never kept.

    weight, weight_scale, weight_zero_point: as `planning.layout` has them.
    """

    def __init__(
        self, linear: Any, config: QuarkOptions, dtype: torch.dtype, packing: str, tensors: Mapping[str, Tensor]
    ) -> None:
        super().__init__(linear, tensors)
        self.options, self.compute_dtype, self.packing = config, dtype, packing

    def dequantize(self) -> Tensor:
        """The weight in the compute dtype, (out_features, in_features); computed in float32."""
        weights, size = self.options.weights, self.options.group_size
        if weights == "mxfp4":
            values = self.weight.new_tensor(FP4, dtype=torch.float32)[_fp4_codes(self.weight).long()]
            return self._scaled(values, self.powers())
        if weights == "fp8":
            return self._scaled(self.weight.float(), self.weight_scale.reshape(-1, 1))
        codes, zeros = (self.integers(tensor).float() for tensor in (self.weight, self.weight_zero_point))
        scale = self.weight_scale
        if size is None:
            return self._scaled(codes.sub_(zeros.view(-1, 1)), scale.view(-1, 1))
        groups = self.in_features // size
        codes.view(groups, size, self.out_features).sub_(zeros.view(groups, 1, self.out_features))
        return self._scaled(codes.t(), scale.t())

    def powers(self) -> Tensor:
        """The scales of mxfp4, float32: powers of two, whose exponents are stored."""
        exponents = self.weight_scale.int() - 127
        return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)

    def integers(self, tensor: Tensor) -> Tensor:
        """Stored codes or zero points as int8; eight of 4 bit out of each word of the last axis."""
        if self.options.weights == "int8":
            return tensor
        places = NIBBLES[self.packing]
        codes = torch.stack([((tensor >> 4 * place) & 15).to(torch.int8) for place in places], dim=-1).flatten(-2)
        return (codes ^ ZERO) - ZERO if self.options.weights == "int4" else codes

    def _scaled(self, values: Tensor, scale: Tensor) -> Tensor:
        """values: (out_features, in_features), float32, overwritten; scale: the same rows, a column for each group."""
        grouped = values.reshape(self.out_features, scale.shape[-1], -1).mul_(scale.unsqueeze(-1))
        return grouped.reshape(self.out_features, self.in_features).to(self.compute_dtype)


def _fp4_codes(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def quark_linear(
    linear: torch.nn.Linear, config: QuarkOptions, dtype: torch.dtype, packing: str, tensors: Mapping[str, Tensor]
) -> QuarkLinear:
    """The layer that takes the place of `linear`. Raises ModelError where a tensor is missing, astray or misshapen."""
    own = layout((linear.out_features, linear.in_features), config)
    stored = {name: (shape, "float" if kind == "float32" else kind) for name, (shape, kind) in own.items()}
    dtypes = {"bias": dtype, **{name: getattr(torch, kind) for name, (_, kind) in own.items()}}
    expected = {name: Part(*part) for name, part in stored.items()}
    if config.weights == "mxfp4":
        expected["weight_scale"] = Part(*stored["weight_scale"], 0, MOST_EXPONENT)
    found = layer_tensors(linear, tensors, expected)
    held = {name: tensor.to(dtypes[name]).contiguous() for name, tensor in found.items()}
    return QuarkLinear(linear, config, dtype, packing, held)


def pack(module: QuarkLinear) -> PackedWeight:
    """Raises ModelError for zero points of int4, which Quark makes without unless it is asked for them."""
    weights, size = module.options.weights, module.options.group_size or -1
    if weights == "mxfp4":
        codes, table = _fp4_codes(module.weight.detach()), module.weight_scale.new_tensor(FP4, dtype=torch.float32)
        return pack_weight(codes, module.powers().bfloat16(), size, table=table)
    parts = [module.integers(each.detach()) for each in (module.weight, module.weight_zero_point)]
    parts.append(module.weight_scale.detach())
    codes, zeros, scales = (each.t() if size != -1 else each.view(module.out_features, -1) for each in parts)
    if weights == "int8":
        return pack_weight(codes, scales, size, zeros=zeros)
    if weights == "uint4":
        return pack_weight(codes.to(torch.uint8), scales, size, zeros=zeros)
    if bool(zeros.any()):
        raise ModelError("it is int4 with zero points, which has a place as uint4 only")
    return pack_weight((codes + ZERO).to(torch.uint8), scales, size, zero=ZERO)


def describe_layers(model: Any) -> list[LayerInfo]:
    return describe(model, _quantized, skipped=model.config.quantization_config["exclude"])


def _quantized(name: str, module: Any) -> Quantized | None:
    if not isinstance(module, QuarkLinear):
        return None
    shape, options = (module.out_features, module.in_features), module.options
    return Quantized(shape, options.weight_bits, options.weights, KERNEL)
