"""What changed between two comparisons, beyond their noise. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from polyquant.comparison.records import Row, Run
from polyquant.comparison.report import measured_on
from polyquant.comparison.report.column import Column, Noise
from polyquant.comparison.report.columns import COLUMNS, SPEEDS, columns_of
from polyquant.comparison.report.rows import values_of
from polyquant.support.machine import Machine
from polyquant.types import Record

STANDARD_ERRORS = 3.0
"""Of the difference, for figures with a standard error: with 50 candidates fewer than one false alarm in seven runs."""
STANDARD_DEVIATIONS = 2.0
"""Of the difference, for speeds."""
SPEED_SHARE = 0.05
"""Speeds that differ by less are the same: a machine repeats itself no better from one day to the next."""
PEAK_SHARE = 0.1
NOISES: tuple[Noise, ...] = ("standard error", "standard deviation", "exact", "share")
QUALITY = tuple(column.key for column in COLUMNS if column.noise == "standard error")


class Condition(Record, frozen=True):
    """What the two were measured on, where it is not the same."""

    name: str
    before: str
    after: str
    quality: bool = False  # whether figures of quality are not comparable for it


class Change(Record, frozen=True):
    """One figure of one candidate in both comparisons."""

    candidate: str
    figure: str  # a column of the table
    before: float
    after: float
    noise: float  # differences up to so much mean nothing
    worse: bool  # in the direction one does not want

    @property
    def beyond_noise(self) -> bool:
        """Whether it changed."""
        return abs(self.after - self.before) > self.noise

    @property
    def of_speed(self) -> bool:
        """Whether it is a speed, which only means something on the same machine."""
        return self.figure in {column.key for column in SPEEDS}

    @property
    def relative(self) -> float:
        """Change as a share of what it was; infinite where that was zero."""
        return (self.after - self.before) / abs(self.before) if self.before else math.inf


class OtherChange(Record, frozen=True):
    """What changed of a candidate that is no figure: its status, a check that no longer passes, its options."""

    candidate: str
    what: str
    before: str
    after: str
    worse: bool


class Difference(Record, frozen=True, rename={"other_changes": "turns"}):
    """Two comparisons, matched by candidate."""

    before: str  # folder
    after: str
    conditions: tuple[Condition, ...]
    changes: tuple[Change, ...]  # every figure that both have, in the order of the first
    other_changes: tuple[OtherChange, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]

    @property
    def changed(self) -> list[Change]:
        """The changes beyond noise."""
        return [change for change in self.changes if change.beyond_noise]

    @property
    def worsened(self) -> list[Change | OtherChange]:
        """What is worse than it was; speeds count where they are of the same machine."""
        figures = [change for change in self.changed if self.same_machine or not change.of_speed]
        return [
            *(change for change in figures if change.worse),
            *(change for change in self.other_changes if change.worse),
        ]

    @property
    def same_machine(self) -> bool:
        """Whether both were measured on the same kind of machine."""
        return not any(condition.name == "machine" for condition in self.conditions)


def compare_runs(before: Run, after: Run) -> Difference:
    """What changed from `before` to `after`.

    Candidates match by name, or else by backend, options and checkpoint. Noise: STANDARD_ERRORS of the difference for
    KL, top-1, perplexity ratio and tasks; for speeds STANDARD_DEVIATIONS of the difference, at least SPEED_SHARE; for
    peaks PEAK_SHARE; for stored bytes none. On the same tokens the standard errors overstate the noise: what is flagged
    did change. Quality is left out where model, reference, convention or text differ, speeds where one of the two was
    measured beside other work.
    """
    pairs, only_before, only_after = _matched(before, after)
    conditions = tuple(_conditions(before, after))
    hidden = QUALITY if any(condition.quality for condition in conditions) else ()
    known_after = {column.key for column in columns_of(after)} - set(hidden)
    in_both = [column for column in columns_of(before) if column.key in known_after]
    columns = [column for noise in NOISES for column in in_both if column.noise == noise]
    return Difference(
        before=before.folder,
        after=after.folder,
        conditions=conditions,
        changes=tuple(change for one, other in pairs for change in _changes(one, other, columns)),
        other_changes=tuple(change for one, other in pairs for change in _other_changes(one, other)),
        only_before=tuple(row.candidate.name for row in only_before),
        only_after=tuple(row.candidate.name for row in only_after),
    )


def _matched(before: Run, after: Run) -> tuple[list[tuple[Row, Row]], list[Row], list[Row]]:
    rest = list(after.rows)
    pairs, alone = [], []
    names = {row.candidate.name for row in before.rows}
    for row in before.rows:
        same = next((other for other in rest if other.candidate.name == row.candidate.name), None) or next(
            (other for other in rest if other.candidate.name not in names and _asked(other) == _asked(row)), None
        )
        if same is None:
            alone.append(row)
        else:
            rest.remove(same)
            pairs.append((row, same))
    return pairs, alone, rest


def _comparable(columns: Sequence[Column], *rows: Row) -> list[Column]:
    """Without speeds where one of the rows was timed beside other work."""
    beside = any(row.result is not None and row.result.beside_other_work for row in rows)
    return [column for column in columns if not (beside and column.timed)]


def _asked(row: Row) -> tuple[object, ...]:
    return (row.candidate.backend, dict(row.candidate.options), row.candidate.model)


def _changes(one: Row, other: Row, columns: Sequence[Column]) -> Iterator[Change]:
    """Of every column that both have, with its error where it has one."""
    before, after = values_of(one), values_of(other)
    for column in _comparable(columns, one, other):
        keys = [column.key, *([column.error] if column.error else [])]
        if any(values.get(key) is None for values in (before, after) for key in keys):
            continue
        old, new = float(before[column.key]), float(after[column.key])
        yield Change(
            candidate=one.candidate.name, figure=column.key, before=old, after=new, noise=_noise(column, before, after),
            worse=new > old if column.better == "lower" else new < old,
        )  # fmt: skip


def _noise(column: Column, before: dict[str, Any], after: dict[str, Any]) -> float:
    """Differences up to so much mean nothing."""
    error = math.hypot(before[column.error], after[column.error]) if column.error else 0.0
    return margin(column, float(before[column.key]), error)


def margin(column: Column, value: float, error: float) -> float:
    """How far a figure may be from another and still mean the same.

    error: its standard error or deviation, or that of a difference, as the column has it.
    """
    if column.noise == "share":
        return PEAK_SHARE * value
    if column.noise == "standard deviation":
        return max(STANDARD_DEVIATIONS * error, SPEED_SHARE * value)
    return max(STANDARD_ERRORS * error, 1e-9) if column.noise == "standard error" else 0.0


def _other_changes(before: Row, after: Row) -> Iterator[OtherChange]:
    name = before.candidate.name
    if before.status != after.status:
        yield OtherChange(
            candidate=name, what="status", before=before.status, after=after.status, worse=after.status != "done"
        )
    if before.candidate.options != after.candidate.options:
        options = [
            ", ".join(f"{key}={value}" for key, value in row.candidate.options.items()) for row in (before, after)
        ]
        yield OtherChange(candidate=name, what="options", before=options[0], after=options[1], worse=False)
    if before.result is None or after.result is None:
        return
    if before.result.kernel != after.result.kernel and "" not in (before.result.kernel, after.result.kernel):
        yield OtherChange(
            candidate=name, what="kernel", before=before.result.kernel, after=after.result.kernel, worse=False
        )
    passed = {check.name: check.passed for check in before.result.checks}
    for check in after.result.checks:
        if check.name in passed and passed[check.name] != check.passed:
            yield OtherChange(
                candidate=name,
                what=f"check {check.name}",
                before="passed" if passed[check.name] else "failed",
                after="passed" if check.passed else f"failed: {check.found}",
                worse=not check.passed,
            )


def _conditions(before: Run, after: Run) -> Iterator[Condition]:
    for name, of_quality in (
        ("model", False), ("model_hash", True), ("reference", True), ("preset", True), ("text", True),
        ("windows", False), ("device", False),
    ):  # fmt: skip
        values = [str(getattr(run.setting, name)) for run in (before, after)]
        if values[0] != values[1]:
            shown = "content of the model" if name == "model_hash" else name
            yield Condition(name=shown, before=values[0], after=values[1], quality=of_quality)
    machines = [measured_on.machines_of(run) for run in (before, after)]
    facts: dict[str, Callable[[Machine], str]] = {
        "machine": measured_on.short_machine,
        "system": lambda machine: machine.system,
        "python": lambda machine: machine.python,
    }
    for name, text_of in facts.items():
        texts = ["; ".join(sorted({text_of(machine) for machine in of_run})) for of_run in machines]
        if texts[0] != texts[1]:
            yield Condition(name=name, before=texts[0], after=texts[1])
    beside = [measured_on.other_work(run).partition("; ")[0] for run in (before, after)]
    if any(beside):
        yield Condition(name="other work", before=beside[0] or "none known", after=beside[1] or "none known")
    versions = [measured_on.versions_of(of_run) for of_run in machines]
    for library in sorted(versions[0].keys() & versions[1].keys()):
        if versions[0][library] != versions[1][library]:
            yield Condition(name=library, before=versions[0][library], after=versions[1][library])
