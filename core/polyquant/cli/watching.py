"""What is seen of a comparison while it runs: a table that follows the cells, or a line for each that is done."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from polyquant.comparison.records import Row
from polyquant.comparison.run import Watcher

COLOURS = {"done": "green", "failed": "red", "waiting": "dim"}


@contextmanager
def watching(*, live: bool) -> Iterator[Watcher]:
    """Within the block, shows on standard error what the watcher it gives is told."""
    if not live:
        yield Lines()
        return
    with Live(console=Console(stderr=True), refresh_per_second=4, transient=True) as display:
        yield Following(display)


class Lines(Watcher):
    """A line for each cell that is done."""

    def finished(self, row: Row) -> None:
        result = row.result
        if result is not None:
            said = result.reason.splitlines()[0] if result.reason else ""
            print(f"{row.candidate.name}: {result.status} {said}".rstrip(), file=sys.stderr, flush=True)


class Following(Watcher):
    """A table with a row for each cell: what it is doing, what it gave, and what is left."""

    def __init__(self, display: Live) -> None:
        self._display = display
        self._rows: dict[str, Row] = {}
        self._steps: dict[str, str] = {}
        self._reference = ""
        self._began, self._measured = monotonic(), 0

    def begin(self, rows: Sequence[Row]) -> None:
        self._rows = {row.key: row for row in rows}
        self._draw()

    def step(self, key: str, step: str) -> None:
        self._reference = "" if key else step
        if key:
            self._steps[key] = step
        self._draw()

    def finished(self, row: Row) -> None:
        self._rows[row.key] = row
        self._steps.pop(row.key, None)
        self._measured += 1
        self._draw()

    def _draw(self) -> None:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for heading in ("candidate", "", "KL", "tokens/s"):
            table.add_column(heading, justify="right" if heading in ("KL", "tokens/s") else "left")
        for key, row in list(self._rows.items()):
            result = row.result
            state = self._steps.get(key, "waiting") if result is None else result.status
            quality = f"{result.quality.kl_mean:.4f}" if result and result.quality else ""
            speed = f"{result.speed.generated_tokens_per_second.mean:.1f}" if result and result.speed else ""
            table.add_row(
                escape(row.candidate.name), f"[{COLOURS.get(state, 'bold')}]{escape(state)}[/]", quality, speed
            )
        left = sum(row.result is None for row in self._rows.values())
        each = (monotonic() - self._began) / max(self._measured, 1)
        time = f", about {each * left / 60:.0f} min left" if self._measured and left else ""
        table.caption = self._reference or f"{len(self._rows) - left} of {len(self._rows)} done{time}"
        self._display.update(table)
