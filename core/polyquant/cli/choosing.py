"""The backend that a command takes where none is named: what a checkpoint names, else what `recommend` puts first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polyquant
from polyquant.cli.output import say
from polyquant.errors import ConfigError

if TYPE_CHECKING:
    from polyquant.cli.arguments import Loading


def with_backend(model: str, loading: Loading) -> Loading:
    """`loading` with a backend, where the model is dense and none is named; which one is said on standard error.

    Raises ConfigError where nothing that quantizes while it loads fits this machine, with what would have to give.
    """
    if loading.backend is not None:
        return loading
    from polyquant.loading.stored import is_dense
    from polyquant.models.model import Model

    how = loading.options
    given = Model.find(
        model, revision=loading.revision, allow_pickle=how["allow_pickle"], trust_remote_code=how["trust_remote_code"]
    )
    if not is_dense(given.source):
        return loading

    found = polyquant.recommend(
        model, needs=("on_the_fly",), device=how["device"], revision=loading.revision,
        trust_remote_code=how["trust_remote_code"],
    )  # fmt: skip
    if found.best is None:
        raise ConfigError(f"{model}: {'; '.join((found.reason, *found.advice))}; or name a backend (backend=...)")
    best = found.best.candidate
    say(f"{found.reason}; another one: --backend NAME", error=True)
    return loading._replace(backend=best.backend, options={**how, **best.options})
