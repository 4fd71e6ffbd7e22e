"""The conformance suite for backends. A backend's test file derives one class:

class TestAcme(BackendConformance):
    backend = "acme"
    floors = {"int8": Floor(kl=0.03, top1=0.9)}

What `__all__` names here is public and stays: it goes only after a release in which it warns. Checks may be added, and
may find more; their names (as `expected_failures` uses them) change only with a line in the changelog.
Everything else below this package may change at any time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from polyquant.testing.check import Floor

if TYPE_CHECKING:
    from polyquant.testing.models import ARCHITECTURES, tiny_model
    from polyquant.testing.running import Outcome, run_checks
    from polyquant.testing.subject import Subject
    from polyquant.testing.suite import BackendConformance

__all__ = ["ARCHITECTURES", "BackendConformance", "Floor", "Outcome", "Subject", "run_checks", "tiny_model"]

_HOMES = {
    "ARCHITECTURES": "models", "tiny_model": "models", "Outcome": "running", "run_checks": "running",
    "Subject": "subject", "BackendConformance": "suite",
}  # fmt: skip
"""Imported on first use: the checks themselves run without pytest, and pytest starts without them."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
