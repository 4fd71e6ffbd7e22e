"""Bytes of each tensor, from shapes and from what a checkpoint's headers say is packed."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from polyquant.errors import ConfigError
from polyquant.plugin import DTYPE_BYTES, LayerPlan, WeightInfo, plan_dense, refuse_experts, unfit

from polyquant_mlx.formats import GROUPS, Format, packed_format
from polyquant_mlx.options import MlxOptions

FLOAT_DTYPES = ("bfloat16", "float16", "float32")


def plan_layers(weights: Sequence[WeightInfo], config: MlxOptions) -> list[LayerPlan]:
    """Raises ConfigError where groups do not divide a layer's in_features, and for experts with layout="metal"."""
    stored = any(weight.parts for weight in weights)
    if config.layout == "metal" and not stored:
        refuse_experts(weights, config)
    return [
        _plan(weight, config)
        if (_is_packed(weight) if stored else takes(weight, config))
        else plan_dense(weight, config)
        for weight in weights
    ]


def takes(weight: WeightInfo, config: MlxOptions) -> bool:
    """Whether a tensor of a dense model is quantized."""
    if weight.tied_to:
        return False
    if weight.role == "embedding":
        named = config.format_of(weight) is not None
        return is_embedding(weight) and (named or config.vocabulary == "quantize")
    if weight.role == "experts":
        return bool(weight.stacked) and config.layout == "mlx" and not config.skips(weight)
    return weight.role in ("linear", "head") and "Linear" in weight.module and not config.skips(weight)


def is_embedding(weight: WeightInfo) -> bool:
    """Whether it is a plain table of rows, or Gemma's, which are multiplied with a number."""
    return len(weight.shape) == 2 and (weight.module == "Embedding" or weight.module.endswith("ScaledWordEmbedding"))


def _is_packed(weight: WeightInfo) -> bool:
    """Whether a checkpoint holds a tensor packed."""
    return bool(_scales_in(weight))


def _scales_in(weight: WeightInfo) -> list[str]:
    """The dtypes of the scales that a checkpoint holds of a tensor."""
    within = f"{weight.name.rpartition('.')[2]}." if weight.role == "experts" else ""
    return [dtype for name, dtype in weight.parts.items()
            if name.startswith(within) and name.rpartition(".")[2] == "scales"]  # fmt: skip


def scale_dtype(weight: WeightInfo, config: MlxOptions) -> str:
    """Of an affine tensor: the checkpoint's, else the option's."""
    found = [dtype for dtype in _scales_in(weight) if dtype in FLOAT_DTYPES]
    return found[0] if found else config.scale_dtype


def _plan(weight: WeightInfo, config: MlxOptions) -> LayerPlan:
    form = config.format_for(weight)
    _require_fit(weight, form, config)
    layout = packed_format(form, scale_dtype(weight, config))
    return LayerPlan(
        name=weight.name, shape=weight.shape, role=weight.role, bits=form.bits, scheme=form.scheme, quantized=True,
        stored_bytes=quantized_bytes(weight, form, config), packed=layout,
    )  # fmt: skip


def quantized_bytes(weight: WeightInfo, form: Format, config: MlxOptions) -> int:
    """Codes without a gap, and of each group a scale and a bias, or a scale of one byte."""
    count = prod(weight.shape)
    each = 2 * DTYPE_BYTES[scale_dtype(weight, config)] if form.mode == "affine" else 1
    return count * form.bits // 8 + count // form.group_size * each


def _require_fit(weight: WeightInfo, form: Format, config: MlxOptions) -> None:
    columns = weight.shape[1] if weight.stacked == "in_out" else weight.shape[-1]
    if columns % max(form.group_size, 32) == 0:
        return
    what = f"groups of {form.group_size} do not divide in_features {columns}"
    if columns % form.group_size == 0:
        what = f"in_features {columns} is no multiple of 32"
    if config.format_of(weight) is not None:
        raise unfit(weight, what, ["another format for it in layers"])
    smaller = [f"group_size={size}" for size in GROUPS if form.mode == "affine" and columns % size == 0]
    if weight.role in ("embedding", "head"):
        more = f"{' or '.join(smaller)}, or " if smaller else ""
        raise ConfigError(f"{what} in {weight.name} {weight.shape}; use {more}vocabulary='dense'")
    raise unfit(weight, what, smaller)
