"""How far a piece of work is: one protocol, from whatever does the work to whatever shows it."""

from __future__ import annotations

from typing import Protocol

import msgspec

from polyquant.types import Record


class Step(Record, frozen=True):
    """What is being done now, and how far it is."""

    what: str
    done: int = 0  # parts of it that are done
    of: int = 0  # how many parts it has; 0: they are not counted
    work: str = ""  # which piece of work, where several go on at a time: in a comparison, the key of a row

    def __str__(self) -> str:
        return f"{self.what} {self.done}/{self.of}" if self.of else self.what


class Progress(Protocol):
    """Sees work while it is done. Steps may come from several threads."""

    def step(self, step: Step) -> None:
        """The work has begun something else, or is further than it was."""


class Silent(Progress):
    """Shows nothing."""

    def step(self, step: Step) -> None:
        pass


SILENT = Silent()


class ProgressOf(Progress):
    """Passes the steps of one of several pieces of work on, each with the name of that piece."""

    def __init__(self, progress: Progress, work: str) -> None:
        self._progress, self._work = progress, work

    def step(self, step: Step) -> None:
        self._progress.step(msgspec.structs.replace(step, work=self._work))
