"""Whether the tensors of a checkpoint are those that its model needs: none missing, none more, none of other shape."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from polyquant.errors import ModelError

NAMED = 5  # in a message


class Misfit(NamedTuple):
    """How a checkpoint and its model differ, less what transformers itself ignores; names as the model has them."""

    missing: Collection[str]  # without them transformers puts random numbers there
    unexpected: Collection[str]
    mismatched: Collection[tuple[str, tuple[int, ...], tuple[int, ...]]] = ()  # name, shape stored, shape of the model


def require_fit(name: str, misfit: Misfit) -> None:
    """Raises ModelError, with the tensors' names, where a checkpoint called `name` does not fit its model."""
    said = []
    if misfit.missing:
        said.append(f"{_tensors(misfit.missing)} of the model {_are(misfit.missing)} not in the checkpoint")
    if misfit.unexpected:
        said.append(f"{_tensors(misfit.unexpected)} of the checkpoint {_are(misfit.unexpected)} not in the model")
    if misfit.mismatched:
        shapes = [f"{tensor} has the shape {held} in its weight files, and {wanted} by its config.json"
                  for tensor, held, wanted in sorted(misfit.mismatched)]  # fmt: skip
        said.append("; ".join(shapes[:NAMED]) + (f" and {len(shapes) - NAMED} more" if len(shapes) > NAMED else ""))
    if said:
        raise ModelError(
            f"{name}: {'; '.join(said)}; one of the two belongs to another model or is damaged: fetch or write it again"
        )


def _tensors(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:NAMED])
    return shown + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _are(names: Collection[str]) -> str:
    return "is" if len(names) == 1 else "are"
