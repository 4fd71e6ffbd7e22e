"""Which presets store weights in the same layout: one of them is enough on every architecture but the first.

A preset chooses how numbers are rounded and how they are stored. What an architecture can break is the storing: sizes,
tied tensors, biases, fused experts. How they are rounded shows on any of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from polyquant.backend import Backend
from polyquant.errors import PolyquantError
from polyquant.types import LayerPlan, WeightInfo

PROBE = WeightInfo(
    name="model.layers.0.mlp.up_proj.weight", shape=(512, 256), dtype="bfloat16", role="linear", module="Linear"
)
"""A weight of the tiny llama."""


def run_everywhere(handle: Backend) -> list[str]:
    """The presets that run on every tiny model: the first one of each layout, in the card's order.

    Two presets have one layout where the backend's `plan_layers` says the same of a weight: bits, scheme and stored
    bytes with all constants. `plan_is_within_one_percent` holds every preset's plan against its loaded layers. Of a
    backend that does not plan, or does not plan this weight, every preset counts as a layout of its own.
    """
    layouts: list[LayerPlan] = []
    chosen = []
    for preset, options in handle.info.presets.items():
        layout = _layout(handle, options)
        if layout is None or layout not in layouts:
            chosen.append(preset)
        if layout is not None:
            layouts.append(layout)
    return chosen


def _layout(handle: Backend, options: Mapping[str, object]) -> LayerPlan | None:
    """What the backend plans for the probe; None where it does not say."""
    if not handle.can("plan_layers"):
        return None
    try:
        (planned,) = handle.plan_layers([PROBE], handle.config(options))
    except (PolyquantError, ValueError):
        return None
    return planned if planned.quantized else None
