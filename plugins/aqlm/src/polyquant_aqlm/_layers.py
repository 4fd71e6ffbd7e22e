"""How AQLM's modules store their weights, and how they are made from a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aqlm
import torch
from polyquant.errors import ModelError
from polyquant.plugin import LayerInfo
from polyquant.plugin.layers import Quantized, describe
from torch import Tensor

from polyquant_aqlm.kernels import DEQUANTIZE, LOOKUP, multiply
from polyquant_aqlm.options import AqlmOptions
from polyquant_aqlm.planning import SCHEME, packed_shapes

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
    name: str, linear: Any, config: AqlmOptions, dtype: torch.dtype, tensors: Mapping[str, Tensor], kernel: str
) -> QuantizedLinear:
    """A layer from the stored codes, codebooks, scales and bias.

    Raises ModelError where a tensor is missing, or has another shape or type.
    """
    shapes = packed_shapes(name, (linear.out_features, linear.in_features), config)
    shapes |= {"bias": (linear.out_features,)} if linear.bias is not None else {}
    if extra := sorted(set(tensors) - set(shapes)):
        raise ModelError(f"{name} has {', '.join(extra)}, where {', '.join(shapes)} were expected")
    codes = torch.int8 if config.nbits_per_codebook <= 8 else torch.int16
    for key, shape in shapes.items():
        found = tensors.get(key)
        if found is None:
            raise ModelError(f"{name} has no {key}; it has {', '.join(tensors) or 'no tensors'}")
        if tuple(found.shape) != shape:
            raise ModelError(f"{key} of {name} should have shape {shape}, and has {tuple(found.shape)}")
        fits = found.dtype == codes if key == "codes" else found.is_floating_point()
        if not fits:
            wanted = codes if key == "codes" else "a float type"
            raise ModelError(f"{key} of {name} should be {wanted}, and is {found.dtype}")
    layer = QuantizedLinear(linear, config, kernel)
    for key in shapes:
        tensor = tensors[key] if key == "codes" else tensors[key].to(dtype)
        setattr(layer, key, torch.nn.Parameter(tensor, requires_grad=False))
    return layer.eval()


def _quantized(name: str, module: Any) -> Quantized | None:
    if not isinstance(module, QuantizedLinear):
        return None
    return Quantized((module.out_features, module.in_features), module.bits, SCHEME, module.kernel)
