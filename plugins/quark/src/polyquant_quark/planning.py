"""The tensors of a Quark layer from its shape alone, and which layers it can take. Format: quark.torch.utils.pack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from msgspec.structs import replace
from polyquant.plugin import DTYPE_BYTES, LayerPlan, PackedFormat, WeightInfo, plan_linears, unfit

from polyquant_quark.options import QuarkOptions

PER_WORD = 8  # 4-bit codes in an int32
BYTES = {**DTYPE_BYTES, "float8_e4m3fn": 1}
LAYOUTS: Mapping[str, PackedFormat] = {
    "int4": PackedFormat(kind="affine4", group_size=-1, scale_dtype="float32"),
    "uint4": PackedFormat(kind="affine4", group_size=-1, scale_dtype="float32", offsets="zeros"),
    "int8": PackedFormat(kind="int8", group_size=-1, scale_dtype="float32", offsets="zeros"),
    "mxfp4": PackedFormat(kind="codebook4", group_size=-1, scale_dtype="bfloat16"),  # powers of two
}
"""Weights -> their layout with kernel="packed", but for the group; fp8 has none. Quark's int8 may have zero points."""


def plan_layers(weights: Sequence[WeightInfo], config: QuarkOptions) -> list[LayerPlan]:
    """Raises ConfigError where a layer does not fit."""
    return plan_linears(
        weights, config, config.weights, lambda weight: quantized_bytes(weight, config),
        packed=lambda _: packed_format(config),
    )  # fmt: skip


def packed_format(config: QuarkOptions) -> PackedFormat | None:
    """None: fp8."""
    layout = LAYOUTS.get(config.weights)
    return layout and replace(layout, group_size=config.group_size or -1)


def quantized_bytes(weight: WeightInfo, config: QuarkOptions) -> int:
    _require_fit(weight, config)
    return sum(prod(shape) * BYTES[dtype] for shape, dtype in layout(weight.shape, config).values())


def layout(shape: Sequence[int], config: QuarkOptions) -> Mapping[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype) of a layer's tensors. shape: of the weight, (out_features, in_features).

    Integers with groups are stored transposed. Scales are kept in float32, whatever the checkpoint has.
    """
    rows, columns = shape
    if config.weights == "mxfp4":
        return {"weight": ((rows, columns // 2), "uint8"), "weight_scale": ((rows, columns // 32), "uint8")}
    scales: tuple[int, ...] = {"channel": (rows,), "tensor": ()}.get(config.granularity or "", ())
    if config.weights == "fp8":
        return {"weight": ((rows, columns), "float8_e4m3fn"), "weight_scale": (scales, "float32")}
    codes = (rows, columns)
    if config.group_size is not None:
        codes, scales = (columns, rows), (columns // config.group_size, rows)
    step, kind = (1, "int8") if config.weights == "int8" else (PER_WORD, "int32")
    return {
        "weight": ((codes[0], codes[1] // step), kind),
        "weight_scale": (scales, "float32"),
        "weight_zero_point": ((*scales[:-1], scales[-1] // step), kind),
    }


def _require_fit(weight: WeightInfo, config: QuarkOptions) -> None:
    (rows, columns), size, what, fixes = weight.shape, config.group_size, "", list[str]()
    if size is not None and columns % size:
        what = f"group_size {size} does not divide in_features {columns}"
        fitting = [other for other in (16, 32, 64, 128, 256) if columns % other == 0]
        fixes = [f"group_size={max(fitting)}"] if fitting and config.weights != "mxfp4" else []
    elif config.weights in ("int4", "uint4") and rows % PER_WORD:
        what = f"{PER_WORD} 4-bit weights share a word, and do not divide out_features {rows}"
    elif config.weights in ("int4", "uint4") and size is None and columns % PER_WORD:
        what = f"{PER_WORD} 4-bit weights share a word, and do not divide in_features {columns}"
    if what:
        raise unfit(weight, what, fixes)
