"""The table of what loads add to the process, from what docs/examples/peaks.py measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from generate_backends import markdown

MOST = 1.3  # of what is kept
OFF = 0.10  # of a plan
EACH = ("kept", "added", "of kept", "plan")


def peaks_table(path: Path) -> str:
    """A row for each candidate, in MB; bold: what is further off than it is held to."""
    models: Mapping[str, Mapping[str, Mapping[str, Any]]] = json.loads(path.read_text(encoding="utf-8"))
    headings = ("candidate", *(f"{model}: {part}" if part == "kept" else part for model in models for part in EACH))
    names = dict.fromkeys(name for rows in models.values() for name in rows)
    rows = [(f"`{name}`", *(cell for model in models.values() for cell in cells(model.get(name)))) for name in names]
    return markdown(headings, rows)


def cells(figures: Mapping[str, Any] | None) -> tuple[str, ...]:
    """What was kept and added, and how far the plan was off; empty where it was not measured."""
    if figures is None:
        return ("",) * len(EACH)
    if "failed" in figures:
        return (figures["failed"], *("",) * (len(EACH) - 1))
    kept, added, planned = (figures[f"{part}_bytes"] for part in ("kept", "added", "planned"))
    ratio, off = added / kept, planned / added - 1
    return (
        f"{kept / 1e6:.0f}",
        f"{added / 1e6:.0f}",
        f"**{ratio:.2f}**" if round(ratio, 2) > MOST else f"{ratio:.2f}",
        f"**{off:+.0%}**" if round(abs(off), 2) > OFF else f"{off:+.0%}",
    )
