"""Which presets store weights in the same scheme: one of them is enough on every architecture but the first.

A preset chooses how numbers are rounded and in which scheme they are stored. What an architecture can break is the
storing: sizes, tied tensors, biases, fused experts. How numbers are rounded shows on any of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from polyquant.errors import PolyquantError
from polyquant.registry.backend import Backend
from polyquant.types import WeightInfo

PROBE = WeightInfo(
    name="model.layers.0.mlp.up_proj.weight", shape=(512, 256), dtype="bfloat16", role="linear", module="Linear"
)
"""A weight of the tiny llama."""


def run_everywhere(handle: Backend) -> list[str]:
    """The presets that run on every tiny model: the first one of each scheme, in the card's order.

    A preset's scheme is what the backend's `plan_layers` says of a weight, with its bits; `plan_is_within_one_percent`
    holds that against the loaded layers of every preset. Of a backend that does not plan, or does not plan this weight,
    every preset counts as a scheme of its own.
    """
    schemes = {preset: _scheme(handle, options) for preset, options in handle.info.presets.items()}
    firsts = {scheme: preset for preset, scheme in reversed(schemes.items()) if scheme is not None}
    return [preset for preset, scheme in schemes.items() if scheme is None or firsts[scheme] == preset]


def _scheme(handle: Backend, options: Mapping[str, object]) -> tuple[str, float] | None:
    """What the backend plans for the probe; None where it does not say."""
    if not handle.can("plan_layers"):
        return None
    try:
        (planned,) = handle.plan_layers([PROBE], handle.config(options))
    except (PolyquantError, ValueError):
        return None
    return (planned.scheme, planned.bits) if planned.quantized else None
