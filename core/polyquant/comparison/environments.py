"""Which environment a cell runs in: this one, or that of a backend which has its own, with its interpreter."""

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

AnyJob = TypeVar("AnyJob", bound=msgspec.Struct)


def of_backend(backend: str) -> Environment | None:
    """The environment that a backend runs in; None where that is this one. Raises UnknownBackend or BrokenBackend."""
    if backend in (DENSE, ""):
        return None
    handle = handles.backend(backend)
    return handle.environment if isinstance(handle, RemoteBackend) else None


def portable(job: AnyJob, own: Environment | None) -> AnyJob:
    """The job as a backend's own environment can do it: a builtin model as its folder, which only this one can make."""
    if own is None:
        return job
    names = [name for name in ("model", "dense") if str(getattr(job, name, "")).startswith(PREFIX)]
    return msgspec.structs.replace(job, **{name: str(resolve_dense(getattr(job, name)).path) for name in names})


def process(own: Environment | None, variables: Mapping[str, str] | None) -> dict[str, Any]:
    """The interpreter and the variables of a job's process, as `processes.run_logged` takes them."""
    if own is None:
        return {"environment": variables}
    return {"environment": {**own.isolated.variables, **(variables or {})}, "interpreter": own.python}
