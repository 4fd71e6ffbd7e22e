"""polyquant's own backends, installed or not: what each reads, its package, its libraries, what else it is called.

`catalogue.json` beside this file is written from the plugins' cards by `python docs/generate.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec

from polyquant.types import Record

PATH = Path(__file__).with_suffix(".json")
Quantizes = Literal["loading", "calibrates", "offline", "no"]
"""loading: while loading a dense model. calibrates: beforehand, with sample text. offline: beforehand, without."""


class Known(Record, frozen=True):
    """What is known of a backend without its package."""

    package: str  # the distribution that has it
    libraries: tuple[str, ...]  # distributions it stands on, its own first
    reads: tuple[str, ...]  # quant_method names
    also_called: tuple[str, ...]
    quantizes: Quantizes
    isolated: bool  # whether its libraries need an environment of their own

    @property
    def command(self) -> str:
        """What installs it."""
        return f"pip install {self.package}"


@cache
def catalogue() -> Mapping[str, Known]:
    """Name of a backend -> what is known of it."""
    return msgspec.json.decode(PATH.read_bytes(), type=dict[str, Known])


def names_taken() -> set[str]:
    """Every name that a backend of this repository has or is asked for by."""
    return {name for backend, known in catalogue().items() for name in (backend, *known.also_called)}


def readers_of(method: str) -> list[str]:
    """Backends that read checkpoints of a quant_method: the one called like it first, those that live apart last."""
    readers = [name for name, known in catalogue().items() if method in known.reads]
    return sorted(readers, key=lambda name: (name != method, catalogue()[name].isolated, name))


def maker_of(method: str) -> str:
    """The backend that quantizes a dense model to a quant_method while it loads, and so writes it without text."""
    return next(name for name in readers_of(method) if catalogue()[name].quantizes == "loading")


def hint(name: str, installed: Collection[str]) -> str:
    """What stands in for the backend `name`, which is not installed; empty where nothing is known of it."""
    known = catalogue()
    own = next((backend for backend, entry in known.items() if name in entry.also_called), name)
    if own in installed:
        return f" {name!r} is called {own!r} here."
    if own not in known:
        return ""
    others = [other for other in _readers_of_all(known[own].reads) if other in installed]
    if not others:
        return f" Run: {known[own].command}."
    library = f" ({known[others[0]].libraries[0]})" if known[others[0]].libraries else ""
    return f" {others[0]}{library} reads these checkpoints too: take that, or run: {known[own].command}."


def _readers_of_all(methods: Collection[str]) -> list[str]:
    """Backends that read each of some quant_methods, in the order of the first one's readers."""
    each = [readers_of(method) for method in methods]
    return [name for name in each[0] if all(name in readers for readers in each)] if each else []
