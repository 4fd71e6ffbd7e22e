"""Loading a model for a command."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import polyquant
from polyquant.cli.arguments import Loading

if TYPE_CHECKING:
    from polyquant.loaded import LoadedModel


def load_model(model: str, loading: Loading) -> LoadedModel:
    """What `polyquant.load` gives; where standard error is a terminal, with the bars that libraries draw there."""
    from polyquant.cli import show

    with show.loading(model, bars=True):
        return polyquant.load(
            model, loading.backend, revision=loading.revision, progress=sys.stderr.isatty(), **loading.options
        )
