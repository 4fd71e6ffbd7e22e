"""Bytes of rowwise layers from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence

from polyquant.memory.planned import DTYPE_BYTES, plan_dense
from polyquant.types import LayerPlan, WeightInfo

from polyquant_rowwise.options import RowwiseOptions

SCHEME = "int8-row"


def plan_layers(weights: Sequence[WeightInfo], config: RowwiseOptions) -> list[LayerPlan]:
    """One plan for each of `weights`, in their order."""
    return [
        _plan_quantized(weight, config) if is_quantized(weight, config) else plan_dense(weight, config)
        for weight in weights
    ]


def is_quantized(weight: WeightInfo, config: RowwiseOptions) -> bool:
    """Weights of plain `nn.Linear` modules are; a tied head, fused experts and embeddings are not."""
    by_default = config.skip_defaults and not config.skip and weight.default_skip
    skipped = by_default or weight.name.rpartition(".")[0] in config.skip
    return weight.module == "Linear" and len(weight.shape) == 2 and not skipped and not weight.tied_to


def _plan_quantized(weight: WeightInfo, config: RowwiseOptions) -> LayerPlan:
    rows, columns = weight.shape
    return LayerPlan(
        name=weight.name,
        shape=weight.shape,
        role="linear",
        stored_bytes=rows * columns + rows * DTYPE_BYTES[config.scale_dtype],
        bits=config.bits,
        scheme=SCHEME,
        quantized=True,
    )
