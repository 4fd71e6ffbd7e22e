"""What every engine is: something that measures cells somewhere, and gives their results as they finish."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from polyquant.comparison.engines.measure import CellTask
from polyquant.comparison.records import Result
from polyquant.support.progress import Progress


class Engine(Protocol):
    """Measures cells."""

    def run(self, tasks: Sequence[CellTask], work: Path, progress: Progress) -> Iterator[tuple[CellTask, Result]]:
        """Each task with its result, as they finish.

        work: folder for the files of processes on this machine. progress: sees the steps of every cell, with its key as
        `work`; called from several threads.
        """
        ...
