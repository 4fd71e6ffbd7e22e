"""A comparison as CSV, JSON and Markdown. Imports nothing heavy."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from polyquant.comparison.records import Run
from polyquant.comparison.report import behaviour, measured_on
from polyquant.comparison.report.column import MARK
from polyquant.comparison.report.columns import COLUMNS, columns_of, shown
from polyquant.comparison.report.rows import by_quality, first_line, plain_rows


def as_csv(run: Run) -> str:
    """One line a candidate, a line of headings first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [column.key for column in columns_of(run)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _inert(value) for key, value in row.items()} for row in plain_rows(run))
    return text.getvalue()


def _inert(value: object) -> object:
    """A value that no spreadsheet takes for a formula: text that begins like one gets an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def as_plain(run: Run) -> dict[str, Any]:
    """What scripts read: the setting, the machine, notes, and the rows."""
    return {
        "polyquant": run.version,
        "created": run.created,
        "command": run.command,
        "setting": run.setting,
        "machine": run.machine,
        "notes": [*run.notes, *filter(None, [measured_on.other_work(run)])],
        "rows": plain_rows(run),
        **({"answers": answers} if (answers := behaviour.side_by_side(run)) else {}),
    }


def as_markdown(run: Run) -> str:
    """A table for a README or a pull request: few columns, what it was measured on, and what one must know of it."""
    name, *_ = COLUMNS
    columns = [name, *shown(columns_of(run), "markdown")]
    headings = [column.title for column in columns]
    rows = by_quality(plain_rows(run))
    measured = [values for values in rows if values["status"] in ("done", "check failed")]
    lines = [[_escaped(column.text(values)) for column in columns] for values in measured]
    widths = [max(len(line[index]) for line in (headings, *lines)) for index in range(len(headings))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        for line in (headings, rule, *lines)
    ]
    text = ["| " + " | ".join(line) + " |" for line in padded]
    failed = [values for values in rows if values["status"] != "done"]
    text += ["", measured_on.one_line(run), *(["", *map(_failure, failed)] if failed else [])]
    if beside := measured_on.other_work(run):
        text += ["", f"{_escaped(MARK)} {_escaped(beside)}."]
    text += ["", *(f"Note: {_escaped(note)}." for note in run.notes)] if run.notes else []
    return "\n".join(text) + "\n"


def _failure(values: Mapping[str, Any]) -> str:
    return f"- {_escaped(values['candidate'])} ({values['status']}): {_escaped(first_line(values['reason']))}"


def _escaped(text: str) -> str:
    """Text that means nothing to Markdown or HTML."""
    for sign in "\\|<>[]*_`":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("&", "&amp;").replace("\n", " ")
