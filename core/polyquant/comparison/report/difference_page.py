"""A difference of two comparisons as tables for people. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polyquant.comparison.report.difference import (
    PEAK_SHARE,
    SPEED_SHARE,
    SPEEDS,
    STANDARD_DEVIATIONS,
    STANDARD_ERRORS,
    Change,
    Difference,
)
from polyquant.support.sizes import size

CHANGE = ("candidate", "figure", "before", "after", "change", "noise")


def summary(found: Difference) -> str:
    """In one sentence."""
    changed = found.changed
    matched = _count(len({change.candidate for change in found.changes}), "candidate")
    if not (changed or found.turns or found.only_before or found.only_after):
        return f"nothing changed beyond noise in {_count(len(found.changes), 'figure')} of {matched}."
    worse = len(found.worsened)
    parts = [
        f"{len(changed)} of {_count(len(found.changes), 'figure')} of {matched} changed beyond noise",
        *([f"{_count(len(found.turns), 'other change')}"] if found.turns else []),
        *([f"{_count(len(found.only_before), 'candidate')} no longer there"] if found.only_before else []),
        *([f"{_count(len(found.only_after), 'new candidate')}"] if found.only_after else []),
        f"{worse} for the worse" if worse else "nothing for the worse",
    ]
    return ", ".join(parts) + "."


def sections(found: Difference) -> list[dict[str, Any]]:
    """Headings and rows of every table; each row says whether it is for the worse."""
    hidden = any(condition.quality for condition in found.conditions)
    figures = [change for change in found.changed if change.figure not in SPEEDS]
    speeds = [change for change in found.changed if change.figure in SPEEDS]
    return [
        _section(
            "Measured on",
            ("what", "before", "after"),
            [((each.name, each.before, each.after), False) for each in found.conditions],
            "Where the two differ." + (" KL and top-1 are left out: they are not comparable." if hidden else ""),
        ),
        _section(
            "Status, checks, options, kernels",
            ("candidate", "what", "before", "after"),
            [((turn.candidate, turn.what, turn.before, turn.after), turn.worse) for turn in found.turns],
        ),
        _section(
            "Quality and memory beyond noise",
            CHANGE,
            [(change_words(change), change.worse) for change in figures],
            f"Noise: {STANDARD_ERRORS:g} standard errors of the difference for KL, top-1 and tasks, {PEAK_SHARE:.0%} "
            "for peaks, none for stored bytes.",
        ),
        _section(
            "Speed beyond noise",
            CHANGE,
            [(change_words(change), change.worse and found.same_machine) for change in speeds],
            f"Noise: {STANDARD_DEVIATIONS:g} standard deviations of the difference, at least {SPEED_SHARE:.0%}."
            + ("" if found.same_machine else " The machines differ."),
        ),
        _section(
            "Only in one",
            ("candidate", "in"),
            [((name, "before"), False) for name in found.only_before]
            + [((name, "after"), False) for name in found.only_after],
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


def change_words(change: Change) -> tuple[str, ...]:
    """Candidate, figure, before, after, change, noise."""
    exact = change.figure == "weights_stored_bytes"
    words = "{:,.0f}".format if exact else size if change.figure.endswith("_bytes") else "{:.4g}".format
    relative = f"{100 * change.relative:+.3g} %" if change.before else ""
    return (
        change.candidate, change.figure, words(change.before), words(change.after), relative,
        f"± {words(change.noise)}" if change.noise else "exact",
    )  # fmt: skip
