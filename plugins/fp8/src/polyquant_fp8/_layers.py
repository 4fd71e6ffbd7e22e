"""How FP8 modules store their weights, and how they are made: from a dense layer, or from a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from polyquant.errors import ModelError
from polyquant.plugin import E2M1, LayerInfo
from polyquant.plugin.floats import codes_of_pairs
from polyquant.plugin.layers import (
    LinearExperts,
    PackedWeight,
    Quantized,
    describe,
    layer_tensors,
    pack_weight,
    prepare_for_training,
    rows_of,
    take_bias,
)
from polyquant.plugin.packing import scales_of_rows
from polyquant.plugin.parts import dtype_name
from torch import Tensor

from polyquant_fp8._decode import quantize
from polyquant_fp8._modules import KERNEL, Fp4Linear, Fp8Linear
from polyquant_fp8.options import Float8Options
from polyquant_fp8.planning import FP4_BITS, FP4_GROUP, FP4_SCHEME, FP4_STORED, SCHEME, scale_shape

__all__ = ["prepare_for_training"]  # freezing is all that adapters need
E8M0 = torch.float8_e8m0fnu


def describe_layers(model: Any) -> list[LayerInfo]:
    return describe(model, _quantized, skipped=model.config.quantization_config["modules_to_not_convert"] or ())


def quantize_linear(linear: Any, config: Float8Options) -> Fp8Linear:
    """A layer that takes the place of `linear`. Raises ModelError where that holds NaN or infinity."""
    weight, scales = quantize(rows_of(linear), config.block, powers_of_two=config.powers_of_two)
    return Fp8Linear(linear, weight, scales, config).eval()


def linear_from_tensors(
    linear: Any, config: Float8Options, dtype: torch.dtype, tensors: Mapping[str, Tensor]
) -> Fp8Linear:
    """A layer from weight, scales, bias and activation_scale. Raises ModelError where they are wrong."""
    shape, powers, name = (linear.out_features, linear.in_features), config.powers_of_two, config.scale_name
    stored = _as_e8m0(tensors, config)
    expected: dict[str, tuple[tuple[int, ...], str]] = {
        "weight": (shape, "float8_e4m3fn"),
        name: (scale_shape(shape, config), "float8_e8m0fnu" if powers else "float"),
    }
    if config.static_activations:
        expected["activation_scale"] = ((), "float")
    found = layer_tensors(linear, stored, expected)
    take_bias(linear, found, dtype)
    scales = found[name] if powers else found[name].float()
    activation = found["activation_scale"].float() if config.static_activations else None
    return Fp8Linear(linear, found["weight"], scales, config, activation).eval()


def expert_from_tensors(
    linear: Any, config: Float8Options, dtype: torch.dtype, tensors: Mapping[str, Tensor]
) -> Fp8Linear | Fp4Linear:
    """A layer of an expert, FP4 where its weight is of bytes. Raises ModelError where a tensor is wrong."""
    weight = tensors.get("weight")
    if weight is None or dtype_name(weight) not in FP4_STORED:
        return linear_from_tensors(linear, config, dtype, tensors)
    rows, columns = linear.out_features, linear.in_features
    if columns % FP4_GROUP:
        raise ModelError(f"groups of {FP4_GROUP} FP4 weights do not divide {columns} columns")
    found = layer_tensors(linear, _as_e8m0(tensors, config), {
        "weight": ((rows, columns // 2), " or ".join(FP4_STORED)),
        config.scale_name: ((rows, columns // FP4_GROUP), "float8_e8m0fnu" if config.powers_of_two else "float"),
    })  # fmt: skip
    scales = found[config.scale_name]
    return Fp4Linear(linear, found["weight"], scales if config.powers_of_two else scales.float()).eval()


def _as_e8m0(tensors: Mapping[str, Tensor], config: Float8Options) -> dict[str, Tensor]:
    """A layer's tensors; scales that are powers of two, and stored as bytes, as what they are."""
    stored, name = dict(tensors), config.scale_name
    if config.powers_of_two and name in stored and stored[name].dtype == torch.uint8:
        stored[name] = stored[name].view(E8M0)
    return stored


def require_whole_blocks(stack: Tensor, tensors: Mapping[str, Tensor], config: Float8Options) -> None:
    """Raises ModelError where the rows of an expert's two matrices do not come in whole blocks, each for itself.

    stack: (experts, out_features, in_features). tensors: as `experts.part_of` names them.
    """
    in_fp4 = any(name.endswith(".weight") and dtype_name(each) in FP4_STORED for name, each in tensors.items())
    joined = not in_fp4 and any(name.split(".")[1] == "1" for name in tensors)
    if joined and (config.block is None or (stack.shape[1] // 2) % config.block[0]):
        what = "one scale for a matrix" if config.block is None else f"blocks of {config.block[0]} rows"
        raise ModelError(
            f"its experts have matrices of {stack.shape[1] // 2} rows, which are multiplied together here, and {what}; "
            "take the dense checkpoint"
        )


def pack(module: Fp8Linear | Fp4Linear) -> PackedWeight:
    """Raises ModelError for weights that are NaN."""
    if isinstance(module, Fp4Linear):
        codes, scales = (module._parameters[name].detach() for name in ("weight", "weight_scale_inv"))
        wide = scales.float() if scales.element_size() > 1 else scales.to(torch.bfloat16)
        return pack_weight(codes_of_pairs(codes.view(torch.uint8)), wide, FP4_GROUP, table=torch.tensor(E2M1))
    block_rows, block_columns = module.block or (1, -1)
    scales = scales_of_rows(module.scales.float(), module.out_features, block_rows)
    return pack_weight(module.weight.detach(), scales, block_columns)


def _quantized(name: str, module: Any) -> Quantized | None:
    if isinstance(module, LinearExperts):
        bits, scheme = (FP4_BITS, FP4_SCHEME) if isinstance(module.like, Fp4Linear) else (8, SCHEME)
        return Quantized(module.dense_shape, bits, scheme, KERNEL, tensor="", role="experts")
    if not isinstance(module, Fp8Linear):
        return None
    return Quantized((module.out_features, module.in_features), 8, SCHEME, KERNEL)
