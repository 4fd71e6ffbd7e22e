"""What a process holds before it loads anything: Python, torch, transformers and a backend's libraries."""

from __future__ import annotations

from polyquant.backend import Backend
from polyquant.memory.predicted import resident_bytes
from polyquant.types import Problem

_grown: dict[str, int] = {}
"""Distribution -> bytes that this process grew by when it was imported; libraries of one backend come together."""


def problems_of(backend: Backend, device: str) -> list[Problem]:
    """What stops a backend; how much its libraries weigh is kept, because the answer imports them."""
    before = resident_bytes()
    found = backend.problems(device)
    unseen = [library.distribution for library in backend.info.libraries if library.distribution not in _grown]
    for distribution in unseen:
        _grown[distribution] = 0
    if unseen:
        _grown[unseen[0]] = max(0, resident_bytes() - before)
    return found


def process_bytes(backend: Backend, device: str) -> int:
    """Resident set of a process that imported what this backend needs, and no other backend's libraries.

    0 on a device of its own memory. What a backend imports only while it loads is not in it.
    """
    if device.partition(":")[0] != "cpu":
        return 0
    own = {library.distribution for library in backend.info.libraries}
    others = sum(grown for distribution, grown in _grown.items() if distribution not in own)
    return resident_bytes() - others
