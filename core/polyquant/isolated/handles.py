"""The installed backends, wherever each lives: in this environment, or in one of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, overload

from polyquant.errors import BrokenBackend
from polyquant.isolated.environments import card_in_this_process, needs_own_environment
from polyquant.registry.installed import registry
from polyquant.registry.query import Miss, Selection, select

if TYPE_CHECKING:
    from polyquant.registry.backend import Backend


def backends(**query: object) -> Selection:
    """Installed backends, filtered by capabilities; imports neither torch nor any backend's library.

    >>> polyquant.backends(bits=4, device="cpu", on_the_fly=True).names

    `misses` of the result holds the others, nearest first, with why each misses.
    """
    cards, broken = [], []
    for name in registry().names():
        try:
            cards.append(card_in_this_process(registry().info(name)))
        except BrokenBackend as error:
            broken.append(Miss(name=name, reasons=(str(error),), broken=True))
    return select(cards, query, broken)


def backend(name: str) -> Backend:
    """One backend by name. Raises UnknownBackend or BrokenBackend."""
    from polyquant.isolated.remote import RemoteBackend
    from polyquant.registry.backend import Backend

    return (RemoteBackend if needs_own_environment(registry().info(name)) else Backend)(name, registry())


@overload
def written(backend: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]: ...
@overload
def written(backend: str | None, options: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]: ...
def written(backend: str | None, options: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """`backend` as people write it, `gguf:Q8_0` or `gguf:Q8_0,compute_dtype=bfloat16`: its name and all options."""
    from polyquant.registry.written import named

    return (None, dict(options)) if backend is None else named(backend, options, registry().info)


def environment_name(handle: Backend) -> str:
    """The name of the environment that a backend runs in; empty where that is this one."""
    from polyquant.isolated.remote import RemoteBackend

    return handle.environment.name if isinstance(handle, RemoteBackend) else ""
