"""Cells of a comparison whose backend lives elsewhere: they run with that environment's interpreter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from polyquant.comparison.candidates import DENSE
from polyquant.isolated import handles
from polyquant.isolated.environments import Environment
from polyquant.isolated.remote import RemoteBackend
from polyquant.models.builtin import PREFIX
from polyquant.models.resolve import resolve_dense

Asked = TypeVar("Asked", bound=msgspec.Struct)


def where(backend: str) -> Environment | None:
    """The environment that a backend runs in; None where that is this one. Raises UnknownBackend or BrokenBackend."""
    if backend in (DENSE, ""):
        return None
    handle = handles.backend(backend)
    return handle.environment if isinstance(handle, RemoteBackend) else None


def portable(asked: Asked, away: Environment | None) -> Asked:
    """A job for that environment: a builtin model as its folder, which only this one knows to make."""
    if away is None:
        return asked
    names = [name for name in ("model", "dense") if str(getattr(asked, name, "")).startswith(PREFIX)]
    return msgspec.structs.replace(asked, **{name: str(resolve_dense(getattr(asked, name)).path) for name in names})


def process(away: Environment | None, variables: Mapping[str, str] | None) -> dict[str, Any]:
    """The interpreter and the variables of a job's process, as `processes.run_logged` takes them."""
    if away is None:
        return {"environment": variables}
    return {"environment": {**away.isolated.variables, **(variables or {})}, "interpreter": away.python}
