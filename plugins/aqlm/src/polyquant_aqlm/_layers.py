"""How AQLM's modules store their weights, and how they are made from a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aqlm
import torch
from polyquant.errors import ModelError
from polyquant.plugin import LayerInfo
from polyquant.plugin.layers import Quantized, describe, layer_tensors, prepare_for_training
from torch import Tensor

from polyquant_aqlm._kernels import DEQUANTIZE, LOOKUP, multiply
from polyquant_aqlm.options import AqlmOptions
from polyquant_aqlm.planning import SCHEME, packed_shapes

__all__ = ["prepare_for_training"]  # freezing is all that adapters need
TENSORS = ("codes", "codebooks", "scales")


class QuantizedLinear(aqlm.QuantizedLinear):
    """aqlm's module, with products of its own: codes keep their order, and any dtype and number of threads is right.

    Of the same name because PEFT asks for that.
    """

    def __init__(self, linear: Any, config: AqlmOptions, kernel: str) -> None:
        super().__init__(
            linear.in_features, linear.out_features, config.in_group_size, config.out_group_size,
            config.num_codebooks, config.nbits_per_codebook, bias=linear.bias is not None, device="meta",
        )  # fmt: skip
        self.kernel, self.bits = kernel, config.weight_bits

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) to (..., out_features)."""
        tokens = input.reshape(-1, self.in_features)
        y = multiply(tokens, self.codes, self.codebooks, self.scales, self.bias, self.kernel)
        return y.view(*input.shape[:-1], self.out_features)


def describe_layers(model: Any) -> list[LayerInfo]:
    dense = model.config.quantization_config["linear_weights_not_to_quantize"]
    return describe(model, _quantized, skipped={name.removesuffix(".weight") for name in dense})


def chosen_kernel(config: AqlmOptions, device: str) -> str:
    """Raises ModelError where the lookup is asked for and cannot run."""
    fits = device == "cpu" and config.compute_dtype == "float32"
    if config.kernel == "lookup" and not fits:
        raise ModelError(
            f"kernel 'lookup' runs on the CPU in float32, not on {device} in {config.compute_dtype}; "
            "use kernel='dequantize'"
        )
    fits = fits and (config.nbits_per_codebook, config.out_group_size) == (8, 1)
    return LOOKUP if fits and config.kernel != "dequantize" else DEQUANTIZE


def linear_from_tensors(
    linear: Any, config: AqlmOptions, dtype: torch.dtype, tensors: Mapping[str, Tensor], kernel: str
) -> QuantizedLinear:
    """A layer from the stored codes, codebooks, scales and bias.

    Raises ModelError where a tensor is missing, or has another shape or type.
    """
    kinds = {"codes": "int8" if config.nbits_per_codebook <= 8 else "int16"}
    shapes = packed_shapes((linear.out_features, linear.in_features), config)
    expected = {name: (shape, kinds.get(name, "float")) for name, shape in shapes.items()}
    layer = QuantizedLinear(linear, config, kernel)
    for name, tensor in layer_tensors(linear, tensors, expected).items():
        held = tensor if name == "codes" else tensor.to(dtype)
        setattr(layer, name, torch.nn.Parameter(held, requires_grad=False))
    return layer.eval()


def _quantized(name: str, module: Any) -> Quantized | None:
    if not isinstance(module, QuantizedLinear):
        return None
    return Quantized((module.out_features, module.in_features), module.bits, SCHEME, module.kernel)
