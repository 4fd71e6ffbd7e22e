"""The conformance suite for backends. A backend's test file derives one class:

class TestAcme(BackendConformance):
    backend = "acme"
    floors = {"int8": Floor(kl=0.03, top1=0.9)}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polyquant.testing.check import Floor

if TYPE_CHECKING:
    from polyquant.testing.suite import BackendConformance

__all__ = ["BackendConformance", "Floor"]


def __getattr__(name: str) -> Any:
    """The test class, imported with pytest on first use: the checks themselves run without it."""
    if name == "BackendConformance":
        from polyquant.testing.suite import BackendConformance

        return BackendConformance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
