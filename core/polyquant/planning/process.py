"""What a process holds before it loads anything: Python, torch, transformers and a backend's libraries."""

from __future__ import annotations

from polyquant.memory.predicted import resident_bytes
from polyquant.registry.backend import Backend
from polyquant.types import Problem

_grown: dict[str, int] = {}
"""Distribution -> bytes that this process grew by when it was imported; libraries of one backend come together."""


def bare_bytes() -> int:
    """Resident set of this process now, without what backends' libraries weigh."""
    return resident_bytes() - sum(_grown.values())


def problems_of(backend: Backend, device: str) -> list[Problem]:
    """What stops a backend; how much its libraries weigh is kept, because the answer imports them."""
    before = resident_bytes()
    found = backend.problems(device)
    unseen = [library.distribution for library in backend.info.libraries if library.distribution not in _grown]
    if unseen:
        _grown.update(dict.fromkeys(unseen, 0))
        _grown[unseen[0]] = max(0, resident_bytes() - before)
    return found


def process_bytes(bare: int, backend: Backend, device: str) -> int:
    """Resident set of a process of `bare` bytes that imported this backend's libraries, and no other backend's.

    0 on a device with memory of its own. What a backend imports only while it loads is not in it.
    """
    if device.partition(":")[0] != "cpu":
        return 0
    return bare + sum(_grown.get(library.distribution, 0) for library in backend.info.libraries)
