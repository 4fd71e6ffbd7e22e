"""The quantized module, and how it stores its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from polyquant.plugin import LayerInfo
from polyquant.plugin.layers import (
    PackedWeight,
    Quantized,
    WeightCodes,
    describe,
    frozen_linear,
    layer_tensors,
    pack_weight,
    prepare_for_training,
)

from polyquant_rowwise.options import RowwiseOptions
from polyquant_rowwise.planning import SCHEME

__all__ = ["prepare_for_training"]  # freezing is all that adapters need
# Replace: what multiplies with the quantized weights; users see it.
KERNEL = "torch matmul on int8 cast to the compute dtype"
LARGEST = 127  # symmetric: -128 is not used


# Replace: your quantized module, or your library's. It may store its weight in any way.
class RowwiseLinear(torch.nn.Linear):
    """`nn.Linear` with int8 weights (out_features, in_features) and one scale for each row (out_features, 1).

    It is an `nn.Linear`, so that adapters wrap it; its weight is a frozen buffer.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.nn.Parameter | None) -> None:
        torch.nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = bias
        self.eval()

    @classmethod
    def quantize(cls, linear: torch.nn.Linear, scale_dtype: torch.dtype) -> RowwiseLinear:
        """Round to the nearest of 255 steps: a row's largest absolute weight is 127 of them; zeros stay zero."""
        dense = linear.weight.detach().float()
        largest = dense.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * LARGEST)
        scale = (largest / LARGEST).to(scale_dtype)
        weight = (dense / scale.float()).round().clamp(-LARGEST, LARGEST).to(torch.int8)
        return cls(weight, scale, linear.bias)

    @classmethod
    def from_tensors(
        cls, linear: Any, tensors: Mapping[str, torch.Tensor], scale_dtype: torch.dtype, dtype: torch.dtype
    ) -> RowwiseLinear:
        """From the stored weight, scale and bias; the bias takes the compute dtype. Raises ModelError for others."""
        rows, columns = linear.out_features, linear.in_features
        stored = layer_tensors(linear, tensors, {"weight": ((rows, columns), "int8"), "scale": ((rows, 1), "float")})
        bias = torch.nn.Parameter(stored["bias"].to(dtype)) if "bias" in stored else None
        return cls(stored["weight"], stored["scale"].to(scale_dtype), bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: (..., in_features) in the compute dtype; returns (..., out_features)."""
        output = frozen_linear(input, lambda: [self.weight]) * self.scale.to(input.dtype).squeeze(1)
        return output if self.bias is None else output + self.bias


# Replace: how one layer becomes yours. With kernel="packed" polyquant asks it of each fused expert of a mixture too.
def quantize_linear(linear: torch.nn.Linear, config: RowwiseOptions) -> RowwiseLinear:
    """The layer that takes the place of a dense one."""
    return RowwiseLinear.quantize(linear, getattr(torch, config.scale_dtype))


def pack(module: RowwiseLinear) -> PackedWeight:
    """With kernel="packed": the same weight for polyquant's own kernels, nothing rounded."""
    return pack_weight(module.weight, module.scale)


def unpack(weight: WeightCodes, config: RowwiseOptions) -> dict[str, torch.Tensor]:
    """The way back, by which `polyquant convert` writes this format: the stored tensors, nothing rounded."""
    rows = weight.integers(8).without_zero_points().in_order().in_groups(-1)
    return {"weight": rows.codes, "scale": rows.scales_as(getattr(torch, config.scale_dtype))}


def describe_layers(model: Any) -> list[LayerInfo]:
    """Every tensor once: polyquant counts the bytes, and `_quantized` says which modules are quantized."""
    return describe(model, _quantized, skipped=model.config.quantization_config["modules_to_not_convert"] or ())


def _quantized(name: str, module: Any) -> Quantized | None:
    # Replace: how your modules are told apart, their shape before packing, bits and scheme.
    if not isinstance(module, RowwiseLinear):
        return None
    return Quantized((module.out_features, module.in_features), 8, SCHEME, KERNEL)
