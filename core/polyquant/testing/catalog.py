"""All checks, in the order they are run; for anything that runs them: the test class, a command line."""

from __future__ import annotations

from polyquant.testing import (
    checks_bytes,
    checks_card,
    checks_files,
    checks_layers,
    checks_load,
    checks_options,
    checks_outputs,
    checks_state,
    checks_train,
)
from polyquant.testing.check import CHECKS, Check

MODULES = (
    checks_card, checks_options, checks_load, checks_outputs, checks_layers, checks_bytes, checks_files, checks_train,
    checks_state,
)  # fmt: skip
ALL: tuple[Check, ...] = tuple(
    each for module in MODULES for each in CHECKS.values() if each.function.__module__ == module.__name__
)
