"""A difference of two comparisons as tables for people. Imports nothing heavy."""

from __future__ import annotations

from typing import Any

from polyquant.comparison.difference import (
    SPEED_SHARE,
    STANDARD_DEVIATIONS,
    STANDARD_ERRORS,
    Change,
    Difference,
)
from polyquant.sizes import size

NOISE = (
    f"Noise: {STANDARD_ERRORS:g} standard errors of the difference for KL, top-1 and tasks, "
    f"{STANDARD_DEVIATIONS:g} standard deviations and at least {SPEED_SHARE:.0%} for speeds; none for stored bytes."
)


def summary(found: Difference) -> str:
    """In one sentence."""
    changed = found.changed
    worse = sum(change.worse for change in changed) + sum(turn.worse for turn in found.turns)
    matched = len({change.candidate for change in found.changes})
    if not (changed or found.turns or found.only_before or found.only_after):
        return f"nothing changed beyond noise in {len(found.changes)} figures of {matched} candidates."
    parts = [
        f"{len(changed)} of {len(found.changes)} figures of {matched} candidates changed beyond noise",
        *([f"{len(found.turns)} other changes"] if found.turns else []),
        *([f"{len(found.only_before)} candidates are gone"] if found.only_before else []),
        *([f"{len(found.only_after)} are new"] if found.only_after else []),
        f"{worse} for the worse" if worse else "nothing for the worse",
    ]
    return ", ".join(parts) + "."


def sections(found: Difference) -> list[dict[str, Any]]:
    """Headings and rows of every table; each row says whether it is for the worse."""
    hidden = any(condition.quality for condition in found.conditions)
    left_out = " KL and top-1 are left out: they are not comparable." if hidden else ""
    return [
        {
            "heading": "Measured on",
            "headings": ("what", "before", "after"),
            "rows": [
                {"cells": (condition.name, condition.before, condition.after), "worse": False}
                for condition in found.conditions
            ],
            "caption": "Where the two differ." + left_out,
        },
        {
            "heading": "Figures that changed beyond noise",
            "headings": ("candidate", "figure", "before", "after", "change", "noise"),
            "rows": [{"cells": change_words(change), "worse": change.worse} for change in found.changed],
            "caption": NOISE,
        },
        {
            "heading": "Status, checks, options, kernels",
            "headings": ("candidate", "what", "before", "after"),
            "rows": [
                {"cells": (turn.candidate, turn.what, turn.before, turn.after), "worse": turn.worse}
                for turn in found.turns
            ],
            "caption": "",
        },
        {
            "heading": "Only in one",
            "headings": ("candidate", "in"),
            "rows": [
                *({"cells": (name, "before"), "worse": False} for name in found.only_before),
                *({"cells": (name, "after"), "worse": False} for name in found.only_after),
            ],
            "caption": "",
        },
    ]


def change_words(change: Change) -> tuple[str, ...]:
    """Candidate, figure, before, after, change, noise."""
    words = size if change.figure.endswith("_bytes") else "{:.4g}".format
    relative = f"{change.relative:+.1%}" if change.before else ""
    return (
        change.candidate, change.figure, words(change.before), words(change.after), relative,
        f"± {words(change.noise)}" if change.noise else "exact",
    )  # fmt: skip
