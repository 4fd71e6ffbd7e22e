"""All checks and their cases, in the order they are run, for whatever runs them: the test class, a command line."""

from __future__ import annotations

from polyquant.registry.backend import Backend
from polyquant.testing import (
    checks_bytes,
    checks_card,
    checks_damage,
    checks_declared,
    checks_files,
    checks_layers,
    checks_load,
    checks_options,
    checks_outputs,
    checks_packed,
    checks_state,
    checks_train,
)
from polyquant.testing.check import CHECKS, Case, ConformanceCheck
from polyquant.testing.schemes import not_in_presets, run_everywhere

MODULES = (
    checks_card, checks_options, checks_load, checks_outputs, checks_layers, checks_bytes, checks_declared,
    checks_files, checks_damage, checks_train, checks_packed, checks_state,
)  # fmt: skip
ALL: tuple[ConformanceCheck, ...] = tuple(
    each for module in MODULES for each in CHECKS.values() if each.function.__module__ == module.__name__
)


def cases(handle: Backend) -> list[tuple[ConformanceCheck, Case]]:
    """Every run of every check on a backend.

    A check of one preset runs on each of the card's. A check of one preset and one architecture runs on each preset
    with `polyquant.testing.check.FIRST`, and on the check's other architectures once for each scheme of the backend's
    presets: with those that `polyquant.testing.schemes.run_everywhere` chooses, and says why. One of what is declared
    runs on what `polyquant.testing.schemes.not_in_presets` finds.
    """
    presets, everywhere, declared = list(handle.info.presets), run_everywhere(handle), not_in_presets(handle)
    return [(each, case) for each in ALL for case in each.cases(presets, everywhere, declared)]
