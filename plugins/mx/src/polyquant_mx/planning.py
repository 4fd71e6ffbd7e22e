"""Bytes of the layers from shapes alone, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

from polyquant.plugin import LayerPlan, WeightInfo, is_linear, plan_dense, unfit

from polyquant_mx.formats import Scheme
from polyquant_mx.options import MxOptions

CODES = ("uint8", "int8", "float8_e4m3fn")
"""Dtypes of packed weights in files."""


def plan_layers(weights: Sequence[WeightInfo], config: MxOptions) -> list[LayerPlan]:
    """Of a quantized checkpoint what is packed there; of a dense one every linear layer and fused experts.

    Raises ConfigError where a format does not fit a layer, or has no layout for fused experts.
    """
    stored = any(weight.parts for weight in weights)
    return [
        _planned(weight, config) if (_is_packed if stored else takes)(weight, config) else plan_dense(weight, config)
        for weight in weights
    ]


def shape_of(weight: WeightInfo) -> tuple[int, int]:
    """(out_features, in_features) of a matrix, or of each of the experts in a tensor."""
    rows, columns = weight.shape[-2:]
    return (columns, rows) if weight.stacked == "in_out" else (rows, columns)


def takes(weight: WeightInfo, config: MxOptions) -> bool:
    """Whether the options quantize a dense weight."""
    return is_linear(weight, config) or (weight.role == "experts" and not config.skips(weight))


def _is_packed(weight: WeightInfo, config: MxOptions) -> bool:
    """Whether a checkpoint holds it packed: its tensors decide, whatever words its config has for what is dense."""
    if weight.role not in ("linear", "head", "experts"):
        return False
    layout, short = config.layout, weight.name.rpartition(".")[2]
    names = (
        {part: f"{short}{end}" for part, end in layout.stacked.items()} if weight.role == "experts" else layout.linear
    )
    packed = weight.parts.get(names.get("qweight", ""), "") in CODES
    return packed or names.get("scales", "") in weight.parts


def _planned(weight: WeightInfo, config: MxOptions) -> LayerPlan:
    scheme, shape = config.scheme_for(weight), shape_of(weight)
    if weight.role == "experts" and not (weight.stacked and config.layout.stacked):
        kind = "this format has no layout for them" if weight.stacked else "transformers multiplies them one way only"
        raise unfit(weight, f"fused experts are not quantized, since {kind},")
    _require_fit(weight, scheme, shape)
    count = weight.shape[0] if weight.role == "experts" else 1
    lengths = {"column_scales": shape[1], "input_scale": 1}
    kept = set() if scheme.rotation else {
        name for name in lengths if config.layout.linear.get(name) in weight.parts
    }  # fmt: skip
    more = sum(4 * lengths[name] for name in kept)
    return LayerPlan(
        name=weight.name, shape=weight.shape, role=weight.role, stored_bytes=count * (scheme.nbytes(shape) + more),
        bits=scheme.bits, scheme=scheme.name, quantized=True,
        packed=scheme.packed(column_scales="column_scales" in kept),
    )  # fmt: skip


def _require_fit(weight: WeightInfo, scheme: Scheme, shape: tuple[int, int]) -> None:
    rows, columns = shape
    if scheme.codes == "int4" and (rows % 2 or columns % scheme.columns):
        raise unfit(weight, f"INT4 pairs of rows and groups of {scheme.columns} do not divide {rows} x {columns}")
    if scheme.rotation and columns % scheme.rotation:
        raise unfit(weight, f"hadamard_group_size {scheme.rotation} does not divide in_features {columns}")
