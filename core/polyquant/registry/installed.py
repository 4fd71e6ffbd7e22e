"""The backends of this process."""

from __future__ import annotations

from functools import cache

from polyquant.registry.registry import Registry


@cache
def registry() -> Registry:
    """The one registry; entry points are read once."""
    return Registry()
