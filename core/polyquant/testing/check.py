"""What a conformance check is: a function of a subject, which raises where the backend breaks a promise."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

from polyquant.loading.kernel import SETTING
from polyquant.packable import LIBRARY
from polyquant.types import Record

CheckFunction = Callable[..., None]
REAL = "real"
"""The model that is no tiny one: the subject's `real_model`."""
FIRST = "llama"
"""The tiny model that every preset is run on; see `polyquant.testing.schemes` for the others."""


class CheckFailed(AssertionError):
    """The backend does not do what it declares; the message says what was expected and what was found."""


class NotApplicable(Exception):
    """The backend does not declare what this check is about, or this machine cannot run it; the message says which."""


class Floor(Record, frozen=True):
    """How close a preset promises to stay to the dense model: on the fixed text of the suite, with the real model."""

    kl: float  # largest mean KL(dense || quantized), nats a position
    top1: float  # smallest share of positions where both put the same token first


@dataclass(frozen=True)
class Case:
    """What one run of a check is about; empty where the check does not ask."""

    preset: str = ""
    model: str = ""

    def __str__(self) -> str:
        return "-".join(part for part in (self.preset, self.model) if part)

    @property
    def arguments(self) -> tuple[str, ...]:
        """What follows the subject in a call of the check."""
        return tuple(part for part in (self.preset, self.model) if part)


@dataclass(frozen=True)
class ConformanceCheck:
    """A check and when it applies."""

    function: CheckFunction
    per: Literal["backend", "preset", "model", "declared"]  # see `cases`
    models: tuple[str, ...]
    needs: tuple[str, ...]  # fields of Capabilities that must be set
    real: bool  # loads the real model

    @property
    def name(self) -> str:
        """Such as saves_and_loads_back; the suite's test is called test_saves_and_loads_back."""
        return self.function.__name__

    @property
    def group(self) -> str:
        """What it is about: card, options, load, outputs, layers, bytes, declared, files, damage, train, packed, ..."""
        return self.function.__module__.rpartition("checks_")[2]

    @property
    def summary(self) -> str:
        """The promise, in one line."""
        return (self.function.__doc__ or "").partition("\n")[0]

    def cases(self, presets: Sequence[str], everywhere: Collection[str], declared: Collection[str]) -> list[Case]:
        """Every run of the check: one for the backend, one for each preset, or for what else is declared.

        Of those for a model, each preset runs on the first, and those of `everywhere` run on every tiny model.
        """
        if self.per == "backend":
            return [Case()]
        if self.per in ("preset", "declared"):
            return [Case(preset) for preset in (presets if self.per == "preset" else declared)]
        return [
            Case(preset, model) for preset in presets for model in self.models if model == FIRST or preset in everywhere
        ]

    def run(self, subject: Any, case: Case) -> None:
        """Raises CheckFailed, NotApplicable, or what the backend raised.

        What multiplies is the backend's library where a check does not ask for the packed runtime.
        """
        for need in self.needs:
            if not getattr(subject.capabilities, need):
                raise NotApplicable(f"{subject.backend} does not declare {need}")
        with patch.dict(os.environ, {SETTING: LIBRARY}):
            self.function(subject, *case.arguments)


CHECKS: dict[str, ConformanceCheck] = {}
"""Every check by name, in the order of definition; `polyquant.testing.catalog` fills it."""


def check(
    *, per: Literal["backend", "preset", "model", "declared"] = "preset", models: Sequence[str] = (),
    needs: Sequence[str] = (), real: bool = False,
) -> Callable[[CheckFunction], CheckFunction]:  # fmt: skip
    """Register a function as a check: f(subject), f(subject, preset) or f(subject, preset, model), as `per` says.

    declared: in place of a preset, what `polyquant.testing.schemes.not_in_presets` names.
    """

    def register(function: CheckFunction) -> CheckFunction:
        CHECKS[function.__name__] = ConformanceCheck(function, per, tuple(models), tuple(needs), real)
        return function

    return register


def expect(condition: object, message: str) -> None:
    """Raises CheckFailed with `message` where `condition` does not hold."""
    if not condition:
        raise CheckFailed(message)
