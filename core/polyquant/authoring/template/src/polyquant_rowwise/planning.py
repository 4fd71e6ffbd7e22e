"""Bytes of rowwise layers from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from polyquant.plugin import DTYPE_BYTES, BackendOptions, LayerPlan, PackedFormat, WeightInfo, plan_linears

from polyquant_rowwise.options import RowwiseOptions

# Replace: the name of your scheme, as the card declares it.
SCHEME = "int8-row"


def plan_layers(weights: Sequence[WeightInfo], config: RowwiseOptions) -> list[LayerPlan]:
    """One plan for each of `weights`, in their order: a byte a weight and a scale a row."""

    def stored_bytes(weight: WeightInfo) -> int:
        # Replace: the bytes that one weight takes when it is stored, constants included.
        return prod(weight.shape) + weight.shape[0] * DTYPE_BYTES[config.scale_dtype]

    def packed(weight: WeightInfo) -> PackedFormat:
        # Replace: the layout of what `pack` gives with kernel="packed"; leave both out where there is none.
        return PackedFormat(kind="int8", group_size=-1, scale_dtype=config.scale_dtype)

    return plan_linears(weights, config, SCHEME, stored_bytes, takes=is_quantized, packed=packed)


def is_quantized(weight: WeightInfo, config: BackendOptions) -> bool:
    """Weights of plain `nn.Linear` modules are; a tied head, fused experts and embeddings are not."""
    return weight.module == "Linear" and len(weight.shape) == 2 and not config.skips(weight)
