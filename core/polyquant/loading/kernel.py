"""What `kernel="auto"` comes to: the packed runtime where it is there, and most weights have a place in it that fits.

Measured on CPUs, SmolLM2 in float32: 8 to 20 times the tokens a second that the libraries' own kernels generate, and
about the speed of a dense model for prompts. For 16-bit activations the libraries keep their own, and for
formats that round activations: the packed runtime multiplies with weights alone as the format has them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from typing import Protocol

from msgspec.structs import replace

from polyquant.errors import ConfigError, EnvironmentProblem
from polyquant.options import BackendOptions
from polyquant.packable import AUTO, LIBRARY, PACKED, PackableOptions, is_packed
from polyquant.packed_weights import kernels
from polyquant.types import LayerPlan, WeightInfo

SETTING = "POLYQUANT_KERNEL"
"""The environment variable that says what auto is: library, or auto."""
MOST_GROWTH = 1.2
"""The bytes that auto may take, of those with the library: 5- and 6-bit codes lie in 8 bits, NVFP4 scales are whole."""


class Planning(Protocol):
    """What the choice needs of a backend's handle."""

    def can(self, hook: str) -> bool: ...
    def plan_layers(self, weights: Sequence[WeightInfo], config: BackendOptions) -> list[LayerPlan]: ...


def may_be_packed(config: BackendOptions, backend: Planning, device: str) -> bool:
    """Whether auto may come to the packed runtime with these options, whatever the weights. Raises ConfigError."""
    setting = os.environ.get(SETTING, AUTO)
    if setting not in (AUTO, LIBRARY):
        raise ConfigError(f"{SETTING} must be '{AUTO}' or '{LIBRARY}', got {setting!r}")
    return (
        isinstance(config, PackableOptions)
        and config.kernel == AUTO
        and setting == AUTO
        and device == "cpu"
        and config.compute_dtype in ("auto", "float32")
        and not config.rounds_activations
        and backend.can("pack")
        and _usable()
    )


def packed(config: BackendOptions, weights: Sequence[WeightInfo], backend: Planning) -> BackendOptions | None:
    """`config` on the packed runtime; None where most of the quantized weights have no place there, or need too much.

    weights: in float32. Where they cannot be planned at all, whoever plans or loads them says why.
    """
    chosen, library = (replace(config, kernel=kernel, compute_dtype="float32") for kernel in (PACKED, LIBRARY))
    try:
        plans, others = (backend.plan_layers(weights, each) for each in (chosen, library))
    except ConfigError:
        return None
    quantized = [plan for plan in plans if plan.quantized]
    placed = sum(prod(plan.shape) for plan in quantized if plan.packed is not None)
    grows = sum(plan.stored_bytes for plan in plans) > MOST_GROWTH * sum(plan.stored_bytes for plan in others)
    return chosen if 2 * placed > sum(prod(plan.shape) for plan in quantized) and not grows else None


def is_chosen(asked: BackendOptions, settled: BackendOptions) -> bool:
    """Whether the packed runtime was chosen here, and not by the user."""
    return is_packed(settled) and not is_packed(asked)


def with_library(config: BackendOptions) -> BackendOptions:
    """`config` with the library's own kernel."""
    return replace(config, kernel=LIBRARY)


def _usable() -> bool:
    try:
        return kernels.library() is not None
    except EnvironmentProblem:  # the doctor, and whoever asks for packed, is told
        return False
