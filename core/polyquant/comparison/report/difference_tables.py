"""What changed between two comparisons, as tables for people. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polyquant.comparison.report.difference import (
    PEAK_SHARE,
    SPEED_SHARE,
    STANDARD_DEVIATIONS,
    STANDARD_ERRORS,
    Change,
    Difference,
)
from polyquant.support.sizes import size

CHANGE = ("candidate", "figure", "before", "after", "change", "noise")


def summary(difference: Difference) -> str:
    """In one sentence."""
    changed = difference.changed
    matched = _count(len({change.candidate for change in difference.changes}), "candidate")
    if not (changed or difference.other_changes or difference.only_before or difference.only_after):
        return f"nothing changed beyond noise in {_count(len(difference.changes), 'figure')} of {matched}."
    worse = len(difference.worsened)
    parts = [
        f"{len(changed)} of {_count(len(difference.changes), 'figure')} of {matched} changed beyond noise",
        *([f"{_count(len(difference.other_changes), 'other change')}"] if difference.other_changes else []),
        *([f"{_count(len(difference.only_before), 'candidate')} no longer there"] if difference.only_before else []),
        *([f"{_count(len(difference.only_after), 'new candidate')}"] if difference.only_after else []),
        f"{worse} for the worse" if worse else "nothing for the worse",
    ]
    return ", ".join(parts) + "."


def sections(difference: Difference) -> list[dict[str, Any]]:
    """Headings and rows of every table; each row says whether it is for the worse."""
    hidden = any(condition.quality for condition in difference.conditions)
    figures = [change for change in difference.changed if not change.of_speed]
    speeds = [change for change in difference.changed if change.of_speed]
    return [
        _section(
            "Measured on",
            ("what", "before", "after"),
            [((where.name, where.before, where.after), False) for where in difference.conditions],
            "Where the two differ." + (" Quality is left out: it is not comparable." if hidden else ""),
        ),
        _section(
            "Status, checks, options, kernels",
            ("candidate", "what", "before", "after"),
            [
                ((change.candidate, change.what, change.before, change.after), change.worse)
                for change in difference.other_changes
            ],
        ),
        _section(
            "Quality and memory beyond noise",
            CHANGE,
            [(_texts(change), change.worse) for change in figures],
            f"Noise: {STANDARD_ERRORS:g} standard errors of the difference for quality and tasks, {PEAK_SHARE:.0%} "
            "for peaks, none for stored bytes.",
        ),
        _section(
            "Speed beyond noise",
            CHANGE,
            [(_texts(change), change.worse and difference.same_machine) for change in speeds],
            f"Noise: {STANDARD_DEVIATIONS:g} standard deviations of the difference, at least {SPEED_SHARE:.0%}."
            + ("" if difference.same_machine else " The machines differ."),
        ),
        _section(
            "Only in one",
            ("candidate", "in"),
            [((name, "before"), False) for name in difference.only_before]
            + [((name, "after"), False) for name in difference.only_after],
        ),
    ]


def _section(
    heading: str, headings: tuple[str, ...], rows: Sequence[tuple[tuple[str, ...], bool]], caption: str = ""
) -> dict[str, Any]:
    return {
        "heading": heading,
        "headings": headings,
        "rows": [{"cells": cells, "worse": worse} for cells, worse in rows],
        "caption": caption,
    }


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'s'[: count != 1]}"


def _texts(change: Change) -> tuple[str, ...]:
    """Candidate, figure, before, after, change, noise."""
    in_bytes = change.figure.endswith("_bytes")
    text = "{:.4g}".format if not in_bytes else size if change.noise else "{:,.0f}".format
    relative = f"{100 * change.relative:+.3g} %" if change.before else ""
    return (
        change.candidate, change.figure, text(change.before), text(change.after), relative,
        f"± {text(change.noise)}" if change.noise else "exact",
    )  # fmt: skip
