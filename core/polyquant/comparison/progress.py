"""What sees a comparison while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from polyquant.comparison.records import Row
from polyquant.support.progress import Progress, Step


class ComparisonProgress(Progress, Protocol):
    """Steps of cells, each with the key of its row as `work`, those of the reference without; and the rows."""

    def begin(self, rows: Sequence[Row]) -> None:
        """All rows are known; those that need no measuring have their results."""

    def finish(self, row: Row) -> None:
        """A row has its result."""


class SilentComparison(ComparisonProgress):
    """Shows nothing. A subclass overrides what it wants to see."""

    def begin(self, rows: Sequence[Row]) -> None:
        pass

    def step(self, step: Step) -> None:
        pass

    def finish(self, row: Row) -> None:
        pass
