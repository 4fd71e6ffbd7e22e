"""The figures of a comparison as the report draws them: points, frontiers, layers. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from polyquant.comparison.candidates import DENSE
from polyquant.comparison.choice import frontier
from polyquant.comparison.records import Comparison, Layer
from polyquant.comparison.report.rows import is_reference, rows, short, status

AXES = {"weights_stored_bytes": 1, "generated_tokens_per_second": -1, "prompt_tokens_per_second": -1}
"""What KL is plotted against; -1: the more the better."""
POINT = (
    "candidate",
    "status",
    "kl_mean",
    "kl_standard_error",
    *AXES,
    "generated_tokens_per_second_standard_deviation",
    "prompt_tokens_per_second_standard_deviation",
)
WORDS = ("name", "kl", "top1", "perplexity", "stored", "of_bfloat16", "prompt", "generated")
"""What `short` gives."""
LOW_BITS, MIDDLE_BITS = 3.5, 6.0
DIGITS = 4  # of the errors of layers


def plotted(comparison: Comparison) -> dict[str, Any]:
    """All that is drawn; `points` has one entry a row, in the order of the comparison."""
    table = rows(comparison)
    return {
        "points": [
            {name: cell[name] for name in POINT}
            | {
                "group": group(cell),
                "reference": is_reference(row, comparison),
                "words": dict(zip(WORDS, short(cell), strict=True)),
            }
            for row, cell in zip(comparison.rows, table, strict=True)
        ],
        "frontiers": frontiers(comparison),
        "layers": _layers(comparison),
    }


def frontiers(comparison: Comparison) -> dict[str, list[int]]:
    """For each axis the indices of the rows that no other beats in both, by rising figure of the axis.

    The reference is no candidate, and what failed its verification is out.
    """
    table = rows(comparison)
    usable = [status(row) == "done" and not is_reference(row, comparison) for row in comparison.rows]
    found = {}
    for axis, sign in AXES.items():
        points = [
            (sign * cell[axis], cell["kl_mean"]) if fit and None not in (cell[axis], cell["kl_mean"]) else None
            for cell, fit in zip(table, usable, strict=True)
        ]
        found[axis] = frontier(points)[::sign]
    return found


def group(cell: dict[str, Any]) -> str:
    """The kind of mark a candidate has in a plot."""
    bits = cell["bits_per_weight"]
    if cell["backend"] == DENSE or bits is None:
        return "dense"
    return "low" if bits <= LOW_BITS else "middle" if bits <= MIDDLE_BITS else "high"


def _layers(comparison: Comparison) -> dict[str, Any]:
    """Layers in columns; names and schemes once each, which keeps the file small with many candidates."""
    names: dict[tuple[str, ...], int] = {}
    schemes: dict[str, int] = {}
    shapes: dict[tuple[tuple[int, ...], ...], int] = {}
    found = {}
    for index, row in enumerate(comparison.rows):
        layers: Sequence[Layer] = row.result.layers if row.result else ()
        if layers:
            found[index] = {
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
    return {"names": list(names), "shapes": list(shapes), "schemes": list(schemes), "of": found}
