"""What changed between two comparisons, beyond their noise. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from polyquant.comparison.records import Comparison, Row
from polyquant.comparison.report.rows import cells, columns, status
from polyquant.comparison.report.words import machine_words
from polyquant.support.machine import Machine
from polyquant.types import Record

STANDARD_ERRORS = 3.0
"""Of the difference, for figures with a standard error: with 50 candidates fewer than one false alarm in seven runs."""
STANDARD_DEVIATIONS = 2.0
"""Of the difference, for speeds."""
SPEED_SHARE = 0.05
"""Speeds that differ by less are the same: a machine repeats itself no better from one day to the next."""
PEAK_SHARE = 0.1
QUALITY = ("kl_mean", "top1")
SPEEDS = ("prompt_tokens_per_second", "generated_tokens_per_second")


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
    def relative(self) -> float:
        """Change as a share of what it was; infinite where that was zero."""
        return (self.after - self.before) / abs(self.before) if self.before else math.inf


class Turn(Record, frozen=True):
    """A candidate that stands elsewhere: one that newly fails, a check that no longer passes, other options."""

    candidate: str
    what: str
    before: str
    after: str
    worse: bool


class Difference(Record, frozen=True):
    """Two comparisons, matched by candidate."""

    before: str  # folder
    after: str
    conditions: tuple[Condition, ...]
    changes: tuple[Change, ...]  # every figure that both have, in the order of the first
    turns: tuple[Turn, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]

    @property
    def changed(self) -> list[Change]:
        """The changes beyond noise."""
        return [change for change in self.changes if change.beyond_noise]

    @property
    def worsened(self) -> list[Change | Turn]:
        """What is worse than it was; speeds count where they are of the same machine."""
        figures = [change for change in self.changed if self.same_machine or change.figure not in SPEEDS]
        return [*(change for change in figures if change.worse), *(turn for turn in self.turns if turn.worse)]

    @property
    def same_machine(self) -> bool:
        """Whether both were measured on the same kind of machine."""
        return not any(condition.name == "machine" for condition in self.conditions)


def difference(before: Comparison, after: Comparison) -> Difference:
    """What changed from `before` to `after`.

    Candidates match by name, or else by backend, options and checkpoint. Noise: STANDARD_ERRORS of the difference for
    KL, top-1 and tasks; for speeds STANDARD_DEVIATIONS of the difference, at least SPEED_SHARE; for peaks PEAK_SHARE;
    for stored bytes none. On the same tokens the standard errors overstate the noise: what is flagged did change.
    KL and top-1 are left out where model, reference, convention or text differ.
    """
    pairs, only_before, only_after = _matched(before, after)
    conditions = tuple(_conditions(before, after))
    comparable = not any(condition.quality for condition in conditions)
    tasks = [name for name in columns(before) if name in columns(after) and f"{name}_standard_error" in columns(before)]
    figures = [name for name in tasks if name not in QUALITY]
    return Difference(
        before=before.folder,
        after=after.folder,
        conditions=conditions,
        changes=tuple(
            change
            for one, other in pairs
            for change in _changes(cells(one), cells(other), [*QUALITY, *figures] if comparable else figures)
        ),
        turns=tuple(turn for one, other in pairs for turn in _turns(one, other)),
        only_before=tuple(row.candidate.name for row in only_before),
        only_after=tuple(row.candidate.name for row in only_after),
    )


def _matched(before: Comparison, after: Comparison) -> tuple[list[tuple[Row, Row]], list[Row], list[Row]]:
    rest = list(after.rows)
    pairs, alone = [], []
    names = {row.candidate.name for row in before.rows}
    for row in before.rows:
        same = next((other for other in rest if other.candidate.name == row.candidate.name), None) or next(
            (other for other in rest if other.candidate.name not in names and _means(other) == _means(row)), None
        )
        if same is None:
            alone.append(row)
        else:
            rest.remove(same)
            pairs.append((row, same))
    return pairs, alone, rest


def _means(row: Row) -> tuple[object, ...]:
    return (row.candidate.backend, dict(row.candidate.options), row.candidate.model)


def _changes(one: dict[str, Any], other: dict[str, Any], means: list[str]) -> Iterator[Change]:
    def both(*names: str) -> bool:
        return all(one.get(name) is not None and other.get(name) is not None for name in names)

    def change(figure: str, noise: float, *, lower_is_better: bool) -> Change:
        before, after = float(one[figure]), float(other[figure])
        return Change(
            candidate=one["candidate"], figure=figure, before=before, after=after, noise=noise,
            worse=after > before if lower_is_better else after < before,
        )  # fmt: skip

    for figure in means:
        error = "kl_standard_error" if figure == "kl_mean" else f"{figure}_standard_error"
        if both(figure, error):
            noise = STANDARD_ERRORS * math.hypot(one[error], other[error])
            yield change(figure, max(noise, 1e-9), lower_is_better=figure == "kl_mean")
    for figure in SPEEDS:
        deviation = f"{figure}_standard_deviation"
        if both(figure, deviation):
            spread = STANDARD_DEVIATIONS * math.hypot(one[deviation], other[deviation])
            yield change(figure, max(spread, SPEED_SHARE * one[figure]), lower_is_better=False)
    if both("weights_stored_bytes"):
        yield change("weights_stored_bytes", 0.0, lower_is_better=True)
    if both("load_peak_bytes"):
        yield change("load_peak_bytes", PEAK_SHARE * one["load_peak_bytes"], lower_is_better=True)


def _turns(one: Row, other: Row) -> Iterator[Turn]:
    name = one.candidate.name
    if status(one) != status(other):
        good = status(other) == "done"
        yield Turn(candidate=name, what="status", before=status(one), after=status(other), worse=not good)
    if one.candidate.options != other.candidate.options:
        said = [", ".join(f"{key}={value}" for key, value in row.candidate.options.items()) for row in (one, other)]
        yield Turn(candidate=name, what="options", before=said[0], after=said[1], worse=False)
    if one.result is None or other.result is None:
        return
    if one.result.kernel != other.result.kernel and "" not in (one.result.kernel, other.result.kernel):
        yield Turn(candidate=name, what="kernel", before=one.result.kernel, after=other.result.kernel, worse=False)
    passed = {check.name: check.passed for check in one.result.checks}
    for check in other.result.checks:
        if check.name in passed and passed[check.name] != check.passed:
            yield Turn(
                candidate=name,
                what=f"check {check.name}",
                before="passed" if passed[check.name] else "failed",
                after="passed" if check.passed else f"failed: {check.found}",
                worse=not check.passed,
            )


def _conditions(before: Comparison, after: Comparison) -> Iterator[Condition]:
    for name, of_quality in (
        ("model", False), ("model_hash", True), ("reference", True), ("preset", True), ("text", True),
        ("windows", False), ("device", False),
    ):  # fmt: skip
        values = [str(getattr(comparison.setting, name)) for comparison in (before, after)]
        if values[0] != values[1]:
            said = "content of the model" if name == "model_hash" else name
            yield Condition(name=said, before=values[0], after=values[1], quality=of_quality)
    machines = [_machines(comparison) for comparison in (before, after)]
    described: dict[str, Callable[[Machine], str]] = {
        "machine": machine_words,
        "system": lambda machine: machine.system,
        "python": lambda machine: machine.python,
    }
    for name, words in described.items():
        found = ["; ".join(sorted({words(machine) for machine in each})) for each in machines]
        if found[0] != found[1]:
            yield Condition(name=name, before=found[0], after=found[1])
    versions = [_versions(each) for each in machines]
    for library in sorted(versions[0].keys() & versions[1].keys()):
        if versions[0][library] != versions[1][library]:
            yield Condition(name=library, before=versions[0][library], after=versions[1][library])


def _machines(comparison: Comparison) -> list[Machine]:
    """Those that measured the rows; the comparison's own where no row was measured."""
    found = [row.result.machine for row in comparison.rows if row.result is not None and row.result.machine is not None]
    return found or [comparison.machine]


def _versions(machines: list[Machine]) -> dict[str, str]:
    found: dict[str, set[str]] = {}
    for machine in machines:
        for library, version in machine.versions.items():
            found.setdefault(library, set()).add(version)
    return {library: ", ".join(sorted(known)) for library, known in found.items()}
