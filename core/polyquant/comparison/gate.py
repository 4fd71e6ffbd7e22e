"""Holds a comparison to limits and to an earlier one: what fails, by candidate and figure. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from polyquant.comparison.records import Row, Run
from polyquant.comparison.report.column import Column
from polyquant.comparison.report.columns import COLUMNS, columns_of
from polyquant.comparison.report.difference import Difference, compare_runs, margin
from polyquant.comparison.report.rows import first_line, values_of
from polyquant.errors import ConfigError, did_you_mean
from polyquant.support.shown import Look, Looked
from polyquant.support.sizes import parse_size, size
from polyquant.types import Record

Verdict = Literal["passed", "within error", "failed"]
"""`within error`: the figure's interval has the limit inside, so that neither is shown."""


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every candidate has to keep; None: any."""

    max_kl: Annotated[float | None, Meta(description="nats to the reference at most")] = None
    max_perplexity_ratio: Annotated[float | None, Meta(description="perplexity over the reference's at most")] = None
    min_top1: Annotated[
        float | None, Meta(description="share of positions with the reference's first token, 0 to 1")
    ] = None
    max_bytes: Annotated[str | None, Meta(description="stored weights at most, such as 6GiB")] = None
    max_load_peak: Annotated[str | None, Meta(description="memory while loading at most, such as 8GiB")] = None
    max_run_peak: Annotated[str | None, Meta(description="memory of a forward pass at most, such as 8GiB")] = None
    min_tokens_per_second: Annotated[float | None, Meta(description="generated tokens a second at least")] = None
    min_prompt_tokens_per_second: Annotated[float | None, Meta(description="prompt tokens a second at least")] = None
    strict: Annotated[bool, Meta(description="a figure passes only where its whole interval keeps the limit")] = False

    def __post_init__(self) -> None:
        for name in LIMITED:
            value = getattr(self, name)
            if isinstance(value, str):
                parse_size(value)
            elif value is not None and not (0 <= value <= (1 if name == "min_top1" else math.inf)):
                raise ValueError(f"{name} is a number from 0{' to 1' if name == 'min_top1' else ''}, got {value}")


LIMITED = {
    "max_kl": "kl_mean", "max_perplexity_ratio": "perplexity_ratio", "min_top1": "top1",
    "max_bytes": "weights_stored_bytes", "max_load_peak": "load_peak_bytes", "max_run_peak": "run_peak_bytes",
    "min_tokens_per_second": "generated_tokens_per_second",
    "min_prompt_tokens_per_second": "prompt_tokens_per_second",
}  # fmt: skip
"""Limit -> the key of the column that it holds."""


class Judgement(Record, frozen=True):
    """One figure of one candidate against what it is held to."""

    candidate: str
    figure: str  # a column of the table; or `status`, a check, ...
    verdict: Verdict
    limit: float | None = None  # of the limit, or what it was in the earlier comparison
    value: float | None = None
    margin: float = 0.0  # the figure is known to so much: see `polyquant.comparison.report.difference.margin`
    reason: str = ""  # what a limit alone does not say


class GateResult(Looked, Record, frozen=True):
    """What was judged, and how."""

    folder: str
    judgements: tuple[Judgement, ...]
    against: str = ""  # folder of the earlier comparison
    strict: bool = False
    notes: tuple[str, ...] = ()

    @property
    def failures(self) -> list[Judgement]:
        """What failed."""
        return [each for each in self.judgements if each.verdict == "failed"]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def look(self) -> Look:
        judged = f"{len(self.judgements)} figure{'s'[: len(self.judgements) != 1]}"
        close = sum(each.verdict == "within error" for each in self.judgements)
        undecided = f", {close} within error of the limit" if close else ""
        said = f"passed: {judged}" if self.passed else f"failed: {len(self.failures)} of {judged}"
        order = ("failed", "within error", "passed")
        rows = [
            (each.verdict, each.candidate, _heading(each), *_figures(each), each.reason)
            for each in sorted(self.judgements, key=lambda each: order.index(each.verdict))
        ]
        return Look(said + undecided, ("", "candidate", "figure", "value", "held to", ""), rows, self.notes)


class _Held(NamedTuple):
    column: Column
    limit: float


def gate(
    run: Run, limits: Limits, *, candidates: Sequence[str] = (), against: Run | None = None
) -> GateResult:  # fmt: skip
    """Judge the rows of a comparison.

    limits: a figure fails where its whole interval is beyond the limit; see `Limits.strict`.
    candidates: names; empty: all but the reference. against: an earlier comparison; what is worse than there beyond
        noise fails, and so do candidates that are no longer there.
    Raises ConfigError where there is nothing to judge or to judge by, and where the two cannot be compared.
    """
    held = _held(limits)
    if not held and against is None:
        raise ConfigError(
            "no limit is given, so nothing can fail: give one, such as max_kl=0.05 or max_bytes='6GiB', or an earlier "
            "comparison: against=..."
        )
    rows = _chosen(run, candidates)
    unmeasured = [one.column.title for one in held if all(values_of(row)[one.column.key] is None for row in rows)]
    if unmeasured and any(row in run.done for row in rows):
        raise ConfigError(
            f"{', '.join(unmeasured)}: measured for none of {', '.join(row.candidate.name for row in rows)} in "
            f"{run.folder}, so no limit can hold it; compare again with parts=('quality', 'speed')"
        )
    judgements = [judgement for row in rows for judgement in _of_row(row, held, strict=limits.strict)]
    notes: list[str] = []
    if against is not None:
        difference = compare_runs(against, run)
        _require_comparable(difference)
        names = [row.candidate.name for row in rows]
        judgements += _lost(against, rows)
        judgements += _against(difference, names, whole=not candidates)
        notes = [f"{one.name}: {one.before} before, {one.after} now" for one in difference.conditions]
        if not difference.same_machine:
            notes.append("speeds are not held to those of another machine")
    return GateResult(
        folder=run.folder, judgements=tuple(judgements), against=against.folder if against else "",
        strict=limits.strict, notes=tuple(notes),
    )  # fmt: skip


def _held(limits: Limits) -> list[_Held]:
    columns = {column.key: column for column in COLUMNS}
    given = [(columns[key], getattr(limits, name)) for name, key in LIMITED.items()]
    return [
        _Held(column, float(parse_size(limit) if isinstance(limit, str) else limit))
        for column, limit in given if limit is not None
    ]  # fmt: skip


def _chosen(run: Run, names: Sequence[str]) -> list[Row]:
    known = {row.candidate.name: row for row in run.rows}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{run.folder} has no candidate {name!r}; there are {', '.join(known)}.{did_you_mean(name, known)}"
            )
    rows = [known[name] for name in names] or [row for row in run.rows if not run.is_reference(row)]
    if not rows:
        raise ConfigError(f"{run.folder} holds nothing but the reference, {run.setting.reference}: nothing to judge")
    return rows


def _of_row(row: Row, held: Sequence[_Held], *, strict: bool) -> Iterator[Judgement]:
    name = row.candidate.name
    good = row.status == "done"
    yield Judgement(
        candidate=name, figure="status", verdict="passed" if good else "failed",
        reason=row.status if good else f"{row.status}: {first_line(row.reason)}",
    )  # fmt: skip
    if row.status in ("done", "check failed"):
        for column, limit in held:
            yield _judged(row, column, limit, strict=strict)


def _judged(row: Row, column: Column, limit: float, *, strict: bool) -> Judgement:
    values = values_of(row)
    value, error = values[column.key], values.get(column.error)
    judgement = Judgement(candidate=row.candidate.name, figure=column.key, verdict="failed", limit=limit, value=value)
    if value is None:
        return msgspec.structs.replace(judgement, reason="not measured")
    if column.timed and row.candidate.emulated:
        return msgspec.structs.replace(judgement, reason="of the emulation: the format's own speed is not known")
    lacking = bool(column.error) and error is None
    around = 0.0 if lacking else margin(column, value, error or 0.0)
    beyond = value - limit if column.better == "lower" else limit - value
    verdict: Verdict = "failed" if beyond > around else "passed" if beyond <= -around else "within error"
    reasons = ["no error was stored with it"] if lacking else []
    if column.timed and row.result is not None and row.result.beside_other_work and verdict == "failed":
        verdict = "within error"
        reasons.append("other work took its cores meanwhile: alone it is faster")
    if strict and verdict == "within error":
        verdict = "failed"
        reasons.append("not shown to keep it (strict)")
    return msgspec.structs.replace(judgement, verdict=verdict, margin=around, reason="; ".join(reasons))


def _require_comparable(difference: Difference) -> None:
    other = [f"{one.name} ({one.before} before, {one.after} now)" for one in difference.conditions if one.quality]
    if other:
        raise ConfigError(
            f"{difference.before} and {difference.after} cannot be held against each other: they differ in "
            f"{'; '.join(other)}. Measure both on the same"
        )


def _lost(before: Run, rows: Sequence[Row]) -> Iterator[Judgement]:
    """Figures that the earlier comparison has and this one lacks."""
    earlier = {row.candidate.name: row for row in before.rows}
    for row in rows:
        if row.status in ("done", "check failed") and row.candidate.name in earlier:
            was, now = values_of(earlier[row.candidate.name]), values_of(row)
            for key in (column.key for column in columns_of(before) if column.noise):
                if was.get(key) is not None and now.get(key) is None:
                    yield Judgement(
                        candidate=row.candidate.name, figure=key, verdict="failed", limit=was[key],
                        reason="measured before, and not now",
                    )  # fmt: skip


def _against(difference: Difference, names: Sequence[str], *, whole: bool) -> Iterator[Judgement]:
    """whole: all that both have, not these candidates alone; what `_of_row` says of a status is not said again."""
    for change in difference.changes:
        if (whole or change.candidate in names) and (difference.same_machine or not change.of_speed):
            worse = change.beyond_noise and change.worse
            yield Judgement(
                candidate=change.candidate, figure=change.figure, verdict="failed" if worse else "passed",
                limit=change.before, value=change.after, margin=change.noise, reason="held to what it was",
            )  # fmt: skip
    for other in difference.other_changes if whole else ():
        if other.worse and other.candidate not in names:
            yield Judgement(
                candidate=other.candidate,
                figure=other.what,
                verdict="failed",
                reason=f"{other.before} -> {other.after}",
            )
    for name in difference.only_before if whole else ():
        yield Judgement(candidate=name, figure="status", verdict="failed", reason="no longer there")


def _heading(judgement: Judgement) -> str:
    return next(
        (column.title for column in COLUMNS if column.key == judgement.figure and column.heading), judgement.figure
    )


def _figures(judgement: Judgement) -> tuple[str, str]:
    """The value with its margin, and what it is held to."""
    text = size if judgement.figure.endswith("_bytes") else "{:.4g}".format
    value = "" if judgement.value is None else text(judgement.value)
    around = f" ± {text(judgement.margin)}" if value and judgement.margin else ""
    return value + around, "" if judgement.limit is None else text(judgement.limit)
