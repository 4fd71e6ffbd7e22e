"""Bytes of the layers from shapes alone. Format: fouroversix.model.modules.linear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from polyquant.plugin import LayerPlan, PackedFormat, WeightInfo, plan_linears, refuse_experts

from polyquant_fouroversix.formats import BLOCK, padded
from polyquant_fouroversix.options import FouroversixOptions

STORED_NAMES = {
    "weight": "quantized_weight_values", "scales": "quantized_weight_scale_factors", "amax": "quantized_weight_amax",
}  # fmt: skip
"""A layer's tensors -> their names in checkpoints, which are the library's own."""
METADATA = "quantized_weight_metadata"
"""Beside them in checkpoints: sizes without and with padding, packed or not, scales swizzled or not; (6,), integers."""
AMAX_BYTES = 4
LAYOUTS: Mapping[str, PackedFormat] = {
    "nvfp4": PackedFormat(
        kind="codebook4", group_size=BLOCK["nvfp4"], scale_dtype="float8_e4m3fn", row_scales="multiply"
    ),
    "mxfp4": PackedFormat(kind="codebook4", group_size=BLOCK["mxfp4"], scale_dtype="bfloat16"),  # powers of two
    "if4": PackedFormat(kind="int8", group_size=BLOCK["if4"], scale_dtype="float32"),  # FP4 doubled, or INT4
    "nvint4": PackedFormat(
        kind="affine4", group_size=BLOCK["nvint4"], scale_dtype="float8_e4m3fn", row_scales="multiply"
    ),
}
"""Format -> its weights with kernel="packed". Scales are a float8 times the tensor's own; IF4's are rounded besides."""


def plan_layers(weights: Sequence[WeightInfo], config: FouroversixOptions) -> list[LayerPlan]:
    """Raises ConfigError where experts of a dense checkpoint are fused into one tensor, and are to be the library's."""
    if not any(weight.parts for weight in weights):  # a quantized checkpoint has them as it has them
        refuse_experts(weights, config)
    return plan_linears(
        weights, config, config.dtype, lambda weight: quantized_bytes(weight, config),
        packed=lambda weight: LAYOUTS[config.dtype],
    )  # fmt: skip


def quantized_bytes(weight: WeightInfo, config: FouroversixOptions) -> int:
    """Two codes and a part of a scale in each byte, padding included, and the tensor's own scale."""
    return sum(prod(shape) for shape in layout(weight.shape, config).values()) + AMAX_BYTES


def layout(shape: tuple[int, ...], config: FouroversixOptions) -> Mapping[str, tuple[int, ...]]:
    """Name -> shape of a layer's codes and scales, a byte each. shape: of the weight, (out_features, in_features)."""
    rows, columns = padded(shape, config.dtype)
    return {"weight": (rows, columns // 2), "scales": (rows * columns // BLOCK[config.dtype],)}
