"""The figures of a comparison as the report draws them: points, frontiers, layers. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from polyquant.comparison.candidates import DENSE
from polyquant.comparison.choice import frontier
from polyquant.comparison.records import Layer, Run
from polyquant.comparison.report.column import Column
from polyquant.comparison.report.columns import AXES, COLUMNS, GOALS, shown
from polyquant.comparison.report.rows import plain_rows

KL = GOALS["quality"]
FRONTIER = shown(COLUMNS, "frontier")
LOW_BITS, MIDDLE_BITS = 3.5, 6.0
DIGITS = 4  # of the errors of layers


def plot_data(run: Run) -> dict[str, Any]:
    """All that is drawn; `points` has one entry a row, in the order of the comparison."""
    drawn = ("candidate", "status", *(key for column in (KL, *AXES) for key in (column.key, column.error) if key))
    return {
        "points": [
            {key: values[key] for key in drawn}
            | {
                "group": group(values),
                "reference": run.is_reference(row),
                "texts": {column.key: column.text(values) for column in FRONTIER},
            }
            for row, values in zip(run.rows, plain_rows(run), strict=True)
        ],
        "axes": {column.key: _axis(column) for column in AXES},
        "columns": [column.key for column in FRONTIER],
        "frontiers": frontiers(run),
        "layers": _layers(run),
    }


def _axis(column: Column) -> dict[str, Any]:
    return {
        "title": column.axis_title, "better": column.better, "error": column.error or None,
        "bytes": column.key.endswith("_bytes"),
    }  # fmt: skip


def frontiers(run: Run) -> dict[str, list[int]]:
    """For each axis the indices of the rows that no other beats in both, by rising figure of the axis.

    The reference is no candidate, and what failed its verification is out.
    """
    usable = [row.status == "done" and not run.is_reference(row) for row in run.rows]
    rows, lines = plain_rows(run), {}
    for axis in AXES:
        sign = 1 if axis.better == "lower" else -1
        points = [
            (sign * values[axis.key], values[KL.key])
            if fit and None not in (values[axis.key], values[KL.key])
            else None
            for values, fit in zip(rows, usable, strict=True)
        ]
        lines[axis.key] = frontier(points)[::sign]
    return lines


def group(values: dict[str, Any]) -> str:
    """The kind of mark a candidate has in a plot."""
    bits = values["bits_per_weight"]
    if values["backend"] == DENSE or bits is None:
        return "dense"
    return "low" if bits <= LOW_BITS else "middle" if bits <= MIDDLE_BITS else "high"


def _layers(run: Run) -> dict[str, Any]:
    """Layers in columns; names and schemes once each, which keeps the file small with many candidates."""
    names: dict[tuple[str, ...], int] = {}
    schemes: dict[str, int] = {}
    shapes: dict[tuple[tuple[int, ...], ...], int] = {}
    of_rows = {}
    for index, row in enumerate(run.rows):
        layers: Sequence[Layer] = row.result.layers if row.result else ()
        if layers:
            of_rows[index] = {
                "names": names.setdefault(tuple(layer.name for layer in layers), len(names)),
                "shapes": shapes.setdefault(tuple(layer.shape for layer in layers), len(shapes)),
                "schemes": [schemes.setdefault(layer.scheme, len(schemes)) for layer in layers],
                "bits": [round(8 * layer.stored_bytes / max(math.prod(layer.shape), 1), 3) for layer in layers],
                "bytes": [layer.stored_bytes for layer in layers],
                "quantized": [int(layer.quantized) for layer in layers],
                "errors": [
                    None if layer.relative_error is None else float(f"{layer.relative_error:.{DIGITS}g}")
                    for layer in layers
                ],
            }
    return {"names": list(names), "shapes": list(shapes), "schemes": list(schemes), "of": of_rows}
