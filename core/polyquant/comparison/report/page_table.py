"""The page's table of candidates, with the details of each. Imports nothing heavy."""

from __future__ import annotations

from typing import Any

import msgspec

from polyquant.comparison.records import Run
from polyquant.comparison.report.column import Column
from polyquant.comparison.report.columns import columns_of, shown
from polyquant.comparison.report.rows import by_quality, first_line, last_lines, plain_rows


def headings_of(run: Run) -> list[dict[str, Any]]:
    """Text, meaning, whether notes concern it, and whether the rows are in its order."""
    name = {"text": "candidate", "meaning": "Backend and options", "noted": False, "sorted": False}
    return [name, *map(_heading, shown(columns_of(run), "page"))]


def rows_of(run: Run) -> list[dict[str, Any]]:
    """What the page shows of every row, closest to the reference first."""
    all_columns = columns_of(run)
    columns = shown(all_columns, "page")
    details = [*shown(all_columns, "page conditions"), *shown(all_columns, "page details")]
    values = [{**plain, "index": index} for index, plain in enumerate(plain_rows(run))]
    return [_row(run, plain, columns, details) for plain in by_quality(values)]


def _heading(column: Column) -> dict[str, Any]:
    """Broken before the unit, or before the last word."""
    start, _, end = (column.heading, "", column.unit) if column.unit else column.heading.rpartition(" ")
    return {
        "text": f"{start}\n{end}" if start else end, "meaning": column.meaning, "noted": column.noted,
        "sorted": column.goal == "quality",
    }  # fmt: skip


def _row(run: Run, values: dict[str, Any], columns: list[Column], details: list[Column]) -> dict[str, Any]:
    row = run.rows[values["index"]]
    found = [(column.heading, f"{text} {column.unit}".rstrip()) for column in details if (text := column.text(values))]
    options = ", ".join(f"{name}={_option(value)}" for name, value in row.candidate.options.items())
    return {
        "index": values["index"],
        "name": row.candidate.label,
        "backend": values["backend"] or "checkpoint",
        "status": row.status,
        "cells": [
            {"text": column.text(values), "value": "" if values.get(column.key) is None else values[column.key]}
            for column in columns
        ],
        "reason": first_line(row.reason),
        "last_lines": last_lines(row.reason),
        "notes": row.result.notes if row.result else (),
        "reference": run.is_reference(row),
        "command": row.command,
        "details": [*([("options", options)] if options else []), *found],
        "searched": " ".join((row.candidate.label, values["kernel"] or "", row.status, options, row.reason)).lower(),
        "layers": bool(row.result and row.result.layers),
    }


def _option(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
