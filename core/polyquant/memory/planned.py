"""What a dense tensor is going to be: shared by every backend's plan."""

from __future__ import annotations

from math import prod

from polyquant.memory.roles import REASONS, SKIPPED, TIED
from polyquant.options import BackendOptions
from polyquant.types import LayerPlan, WeightInfo

DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


def plan_dense(weight: WeightInfo, config: BackendOptions) -> LayerPlan:
    """The plan of a tensor that the backend leaves dense, with the reason."""
    module = weight.name.rpartition(".")[0]
    if weight.tied_to:
        reason = TIED.format(weight.tied_to)
    elif module in config.skip and weight.role != "embedding":
        reason = SKIPPED
    else:
        reason = REASONS[weight.role]
    return LayerPlan(
        name=weight.name,
        shape=weight.shape,
        role=weight.role,
        stored_bytes=0 if weight.tied_to else prod(weight.shape) * DTYPE_BYTES[weight.dtype],
        bits=8 * DTYPE_BYTES[weight.dtype],
        scheme=weight.dtype,
        quantized=False,
        reason=reason,
    )
