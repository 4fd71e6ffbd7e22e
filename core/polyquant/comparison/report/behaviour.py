"""Behaviour in a report: its columns, and answers side by side. Imports nothing heavy."""

from __future__ import annotations

from typing import Any

from polyquant.comparison.records import Result, Run
from polyquant.comparison.report.column import Column
from polyquant.comparison.report.formats import significant
from polyquant.measure.behaviour.prompts import questions
from polyquant.measure.behaviour.records import Answered, Interval

LOW, HIGH = "_low", "_high"  # end the keys of a figure's interval, 95 %


def _column(key: str, heading: str, meaning: str, **more: Any) -> Column:
    return Column(key=key, heading=heading, meaning=meaning, interval=(f"{key}{LOW}", f"{key}{HIGH}"), **more)


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


FIGURES = (
    _column(
        "identical_answers", "same answers",
        "Share of the prompts whose greedy answer, 48 tokens at most, is the reference's token by token",
        format=_share, places=("page", "markdown"), better="higher",
    ),
    _column(
        "parting_token", "part at token",
        "Median of the first token that is another, counted from 0, of the answers that part",
        format=significant, places=("page",), better="higher",
    ),
    _column(
        "right_answers", "right answers", "Share of the prompts answered right, as a program judges it",
        format=_share, places=("page details", "markdown"), better="higher",
    ),
    _column(
        "right_lost", "right lost", "Share of the prompts that the reference answers right, and this one does not",
        format=_share, places=("page", "markdown"),
    ),
    _column(
        "right_gained", "right gained", "Share of the prompts that this one answers right, and the reference does not",
        format=_share, places=("page", "markdown"), better="higher",
    ),
    _column(
        "refusals_lost", "refusals lost", "Share of the prompts that the reference declines, and this one does not",
        format=_share, places=("page details",),
    ),
    _column(
        "refusals_gained", "refusals gained", "Share of the prompts that this one declines, and the reference does not",
        format=_share, places=("page details",),
    ),
)  # fmt: skip
"""Of comparisons that asked; each followed by the ends of its interval."""
COLUMNS = tuple(each for figure in FIGURES for each in (figure, *(Column(key=key) for key in figure.interval)))


def asked_in(run: Run) -> bool:
    """Whether behaviour was measured of any row."""
    return any(row.result is not None and row.result.behaviour is not None for row in run.rows)


def values_of(result: Result) -> dict[str, float | None]:
    """Figures and the ends of their intervals by column; none where it was not asked."""
    if result.behaviour is None:
        return {}
    values: dict[str, float | None] = {}
    for figure in FIGURES:
        known: Interval | None = getattr(result.behaviour, figure.key)
        ends = (known.value, known.low, known.high) if known else (None, None, None)
        values |= dict(zip((figure.key, *figure.interval), ends, strict=True))
    return values


def side_by_side(run: Run) -> list[dict[str, Any]]:
    """Each prompt with the reference's answer and every candidate's."""
    rows = [
        (row.candidate.label, row.result.behaviour)
        for row in run.rows if row.result is not None and row.result.behaviour is not None
    ]  # fmt: skip
    if not rows:
        return []
    return [
        {
            "kind": question.kind, "prompt": question.prompt, "check": question.check, "expected": question.expected,
            **_reference(rows[0][1].asked[number]),
            "differing": sum(measured.asked[number].parts_at is not None for _, measured in rows),
            "same": [name for name, measured in rows if measured.asked[number].parts_at is None],
            "answers": [{"candidate": name, **_answer(measured.asked[number])} for name, measured in rows],
        }
        for number, question in enumerate(questions())
        if all(number < len(measured.asked) for _, measured in rows)
    ]  # fmt: skip


def _reference(asked: Answered) -> dict[str, Any]:
    return {"reference": asked.reference, "right": asked.right_before, "refused": asked.refused_before}


def _answer(asked: Answered) -> dict[str, Any]:
    return {"text": asked.answer, "parts_at": asked.parts_at, "right": asked.right, "refused": asked.refused}
