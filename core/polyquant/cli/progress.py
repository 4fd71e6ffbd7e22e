"""What is seen of long work while it goes on, on standard error: a line, a bar of training, a table of a comparison."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic

import rich.progress
from rich.live import Live
from rich.status import Status
from rich.table import Table
from rich.text import Text

from polyquant.cli.output import say
from polyquant.cli.terminal import Terminal, styled
from polyquant.comparison.progress import ComparisonProgress, SilentComparison
from polyquant.comparison.records import Row
from polyquant.finetuning.options import TrainingStep
from polyquant.support.progress import Progress, Step
from polyquant.support.sizes import size

COLOURS = {"done": "green", "failed": "red", "waiting": "dim"}


@contextmanager
def showing_steps(name: str) -> Iterator[Progress]:
    """A line for each step of `name`; where standard error is a terminal, one line that changes."""
    if not sys.stderr.isatty():
        yield StepLines(name)
        return
    with Terminal(stderr=True).status(styled("{}: starting", name)) as status:
        yield ChangingLine(name, status)


@contextmanager
def showing_training() -> Iterator[Progress]:
    """A bar with loss, learning rate, speed, memory and time left; a line a step where there is no terminal."""
    if not sys.stderr.isatty():
        yield TrainingLines()
        return
    columns = (
        rich.progress.TextColumn("training"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[now]}", markup=False),
    )
    with rich.progress.Progress(*columns, console=Terminal(stderr=True)) as bars:
        yield TrainingBar(bars)


@contextmanager
def showing_rows(*, live: bool) -> Iterator[ComparisonProgress]:
    """A table that follows the rows; where not `live`, a line for each row that is done."""
    if not live:
        yield RowLines()
        return
    with Live(console=Terminal(stderr=True), refresh_per_second=4, transient=True) as display:
        yield RowTable(display)


class StepLines(Progress):
    """A line for each step."""

    def __init__(self, name: str) -> None:
        self._name = name

    def step(self, step: Step) -> None:
        say(f"{shlex.quote(self._name)}: {step}", error=True)


class ChangingLine(Progress):
    """The newest step, in a line that changes."""

    def __init__(self, name: str, status: Status) -> None:
        self._name, self._status = name, status

    def step(self, step: Step) -> None:
        self._status.update(styled("{}: {}", self._name, step))


class TrainingLines(Progress):
    """A line with the loss for each step of training."""

    def step(self, step: Step) -> None:
        if isinstance(step, TrainingStep):
            say(f"step {step.done}/{step.of}: loss {step.loss:.4f}", error=True)


class TrainingBar(Progress):
    """How much of the training is done, with the newest figures."""

    def __init__(self, bars: rich.progress.Progress) -> None:
        self._bars = bars
        self._bar = bars.add_task("training", total=None, now="loading the model")

    def step(self, step: Step) -> None:
        if isinstance(step, TrainingStep):
            figures = (
                f"loss {step.loss:.3f}", f"lr {step.learning_rate:.1e}", f"{step.tokens_per_second:.0f} tokens/s",
                size(step.memory_bytes),
            )  # fmt: skip
            self._bars.update(self._bar, total=step.of, completed=step.done, now=" · ".join(figures))


def _other_work(row: Row) -> str:
    """A warning where a row's speeds were measured beside other work; empty where they were not."""
    result = row.result
    if result is None or not result.beside_other_work:
        return ""
    return f"{row.candidate.name}: other work took {result.other_work_share:.0%} of the cores while speed was measured"


class RowLines(SilentComparison):
    """A line for each row that is done."""

    def finish(self, row: Row) -> None:
        result = row.result
        if result is not None:
            reason = result.reason.splitlines()[0] if result.reason else ""
            say(f"{row.candidate.name}: {result.status} {reason}".rstrip(), error=True)
            if warning := _other_work(row):
                say(warning, error=True)


class RowTable(ComparisonProgress):
    """A table with a line for each row: what it is doing, what it gave, and what is left."""

    def __init__(self, display: Live) -> None:
        self._display = display
        self._rows: dict[str, Row] = {}
        self._steps: dict[str, Step] = {}
        self._reference: Step | None = None
        self._began, self._measured = monotonic(), 0

    def begin(self, rows: Sequence[Row]) -> None:
        self._rows = {row.key: row for row in rows}
        self._draw()

    def step(self, step: Step) -> None:
        self._reference = None if step.work else step
        if step.work:
            self._steps[step.work] = step
        self._draw()

    def finish(self, row: Row) -> None:
        self._rows[row.key] = row
        self._steps.pop(row.key, None)
        self._measured += 1
        if warning := _other_work(row):
            self._display.console.print(styled("[yellow]{}[/]", warning))
        self._draw()

    def _draw(self) -> None:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for heading in ("candidate", "", "KL", "tokens/s"):
            table.add_column(heading, justify="right" if heading in ("KL", "tokens/s") else "left")
        for key, row in list(self._rows.items()):
            result = row.result
            state = str(self._steps.get(key, "waiting")) if result is None else result.status
            quality = f"{result.quality.kl_mean:.4f}" if result and result.quality else ""
            speed = f"{result.speed.generated_tokens_per_second.mean:.1f}" if result and result.speed else ""
            table.add_row(row.candidate.name, Text(state, style=COLOURS.get(state, "bold")), quality, speed)
        left = sum(row.result is None for row in self._rows.values())
        seconds_a_row = (monotonic() - self._began) / max(self._measured, 1)
        time = f", about {seconds_a_row * left / 60:.0f} min left" if self._measured and left else ""
        counted = f"{len(self._rows) - left} of {len(self._rows)} done{time}"
        table.caption = str(self._reference) if self._reference else counted
        self._display.update(table)
