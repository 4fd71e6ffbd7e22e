"""The backends of this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from polyquant.registry.registry import Registry


@cache
def registry() -> Registry:
    """The one registry; entry points are read once."""
    return Registry()


@contextmanager
def observing(observer: object) -> Iterator[None]:
    """Within the block, `observer` sees every addressed hook call: its methods are `hookimpl(wrapper=True)` hooks.

    `polyquant.registry.observers.Recorder`, which records time and peak memory, is one.
    """
    registry().add_observer(observer)
    try:
        yield
    finally:
        registry().remove_observer(observer)
