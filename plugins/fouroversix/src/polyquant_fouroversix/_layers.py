"""How the layers are made, from a dense layer or from a checkpoint's tensors, and what they store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from polyquant.errors import ModelError
from polyquant.plugin import LayerInfo
from polyquant.plugin.layers import (
    Quantized,
    describe,
    layer_tensors,
    prepare_for_training,
    rows_of,
    take_bias,
)
from torch import Tensor

from polyquant_fouroversix._library import quantize
from polyquant_fouroversix._modules import FouroversixLinear
from polyquant_fouroversix._pack import metadata, pack, unpack
from polyquant_fouroversix.options import FouroversixOptions
from polyquant_fouroversix.planning import METADATA, STORED_NAMES, layout

__all__ = ["pack", "prepare_for_training", "unpack"]  # freezing is all that adapters need
KERNEL = "torch dequantize and matmul"
WITH_ACTIVATIONS = KERNEL + ", activations rounded to {}"


def kernel(config: FouroversixOptions) -> str:
    """What multiplies with a layer."""
    return WITH_ACTIVATIONS.format(config.dtype) if config.quantize_activations else KERNEL


def quantize_linear(linear: Any, config: FouroversixOptions) -> FouroversixLinear:
    """A layer that takes the place of `linear`. Raises ModelError where that holds NaN or infinity."""
    return FouroversixLinear(linear, config, quantize(rows_of(linear), config))


def linear_from_tensors(
    linear: Any, config: FouroversixOptions, dtype: torch.dtype, tensors: Mapping[str, Tensor]
) -> FouroversixLinear:
    """A layer from stored tensors under the library's names. Raises ModelError where they are wrong."""
    shape = (linear.out_features, linear.in_features)
    dtypes = {"weight": "uint8", "scales": "float8_e8m0fnu" if config.dtype == "mxfp4" else "float8_e4m3fn"}
    sizes = layout(shape, config)
    expected = {STORED_NAMES[name]: (sizes[name], dtype) for name, dtype in dtypes.items()}
    expected |= {STORED_NAMES["amax"]: ((1,), "float32"), METADATA: ((6,), "int32 or int64")}
    found = layer_tensors(linear, tensors, expected)
    if (said := found[METADATA].tolist()) != (wanted := metadata(shape, config).tolist()):
        raise ModelError(f"{METADATA} of {config.dtype} weights {shape} should be {wanted}, and is {said}")
    take_bias(linear, found, dtype)
    return FouroversixLinear(linear, config, {name: found[stored] for name, stored in STORED_NAMES.items()})


def stored_tensors(layer: FouroversixLinear) -> dict[str, Tensor]:
    """Codes, scales and sizes under the library's names."""
    tensors = {stored: getattr(layer, name) for name, stored in STORED_NAMES.items()}
    return {**tensors, METADATA: metadata((layer.out_features, layer.in_features), layer.config)}


def describe_layers(model: Any) -> list[LayerInfo]:
    stored = model.config.quantization_config
    return describe(model, _quantized, skipped=() if stored["skip_defaults"] else stored["modules_to_not_convert"])


def _quantized(name: str, module: Any) -> Quantized | None:
    if not isinstance(module, FouroversixLinear):
        return None
    config = module.config
    return Quantized((module.out_features, module.in_features), 4, config.dtype, kernel(config))
