"""How the layers are made, from a dense layer or from a checkpoint's tensors, and what they store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from fouroversix import quantize_to_fp4
from polyquant.errors import ModelError
from polyquant.plugin import LayerInfo
from polyquant.plugin.layers import Quantized, describe
from torch import Tensor

from polyquant_fouroversix.formats import SWIZZLED, padded
from polyquant_fouroversix.modules import FouroversixLinear
from polyquant_fouroversix.options import FouroversixOptions
from polyquant_fouroversix.planning import METADATA, STORED_NAMES, layout

KERNEL = "torch dequantize and matmul"
WITH_ACTIVATIONS = KERNEL + ", activations rounded to {}"


def kernel(config: FouroversixOptions) -> str:
    """What multiplies with a layer."""
    return WITH_ACTIVATIONS.format(config.dtype) if config.quantize_activations else KERNEL


def quantized_linear(name: str, linear: Any, config: FouroversixOptions) -> FouroversixLinear:
    """A layer that takes the place of `linear`. Raises ModelError where that holds NaN or infinity."""
    weight = linear.weight.detach()
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(f"{name} holds NaN or infinity and cannot be quantized; the checkpoint is damaged")
    found = quantize_to_fp4(weight, config.native())
    tensors = {"weight": found.values, "scales": found.scale_factors, "amax": found.amax.float().reshape(1)}
    return FouroversixLinear(linear, config, tensors)


def linear_from_tensors(
    linear: Any, config: FouroversixOptions, dtype: torch.dtype, tensors: Mapping[str, Tensor]
) -> FouroversixLinear:
    """A layer from stored tensors under the library's names. Raises ModelError where they are wrong."""
    expected = [*STORED_NAMES.values(), METADATA] + (["bias"] if linear.bias is not None else [])
    if set(expected) != set(tensors):
        raise ModelError(f"it has {', '.join(sorted(tensors))}, where {', '.join(sorted(expected))} were expected")
    shape = (linear.out_features, linear.in_features)
    kinds = {"weight": torch.uint8, "scales": scale_dtype(config), "amax": torch.float32}
    found = {name: tensors[stored] for name, stored in STORED_NAMES.items()}
    for name, size in {**layout(shape, config), "amax": (1,)}.items():
        kind = found[name].dtype
        if kind != kinds[name] or found[name].numel() != torch.Size(size).numel():
            wanted, has = f"{_short(kinds[name])} {size}", f"{_short(kind)} {tuple(found[name].shape)}"
            raise ModelError(f"{STORED_NAMES[name]} of {config.dtype} weights {shape} should be {wanted}, and is {has}")
        found[name] = found[name].view(size)
    if (said := tensors[METADATA].tolist()) != (wanted := metadata(shape, config).tolist()):
        raise ModelError(f"{METADATA} of {config.dtype} weights {shape} should be {wanted}, and is {said}")
    if not all(bool(torch.isfinite(found[name].float()).all()) for name in ("scales", "amax")):
        raise ModelError("its scales hold NaN or infinity; the checkpoint is damaged")
    if linear.bias is not None:
        if tuple(tensors["bias"].shape) != shape[:1]:
            raise ModelError(f"its bias should have shape {shape[:1]}, and has {tuple(tensors['bias'].shape)}")
        linear.bias = torch.nn.Parameter(tensors["bias"].to(dtype), requires_grad=False)
    return FouroversixLinear(linear, config, found)


def stored_tensors(layer: FouroversixLinear) -> dict[str, Tensor]:
    """Codes, scales and sizes under the library's names."""
    tensors = {stored: getattr(layer, name) for name, stored in STORED_NAMES.items()}
    return {**tensors, METADATA: metadata((layer.out_features, layer.in_features), layer.config)}


def metadata(shape: tuple[int, int], config: FouroversixOptions) -> Tensor:
    """As planning.METADATA says, int32."""
    numbers = [*shape, *padded(shape, config.dtype), 1, int(config.dtype in SWIZZLED)]
    return torch.tensor(numbers, dtype=torch.int32)


def scale_dtype(config: FouroversixOptions) -> torch.dtype:
    """Powers of two, or e4m3."""
    return torch.float8_e8m0fnu if config.dtype == "mxfp4" else torch.float8_e4m3fn


def describe_layers(model: Any) -> list[LayerInfo]:
    stored = model.config.quantization_config
    return describe(model, _quantized, skipped=() if stored["skip_defaults"] else stored["modules_to_not_convert"])


def _quantized(name: str, module: Any) -> Quantized | None:
    if not isinstance(module, FouroversixLinear):
        return None
    config = module.config
    return Quantized((module.out_features, module.in_features), 4, config.dtype, kernel(config))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
