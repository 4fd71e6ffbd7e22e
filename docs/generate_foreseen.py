"""Foreseen speed beside measured speed: the table and the picture of what docs/examples/foresee.py measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from generate_backends import markdown
from polyquant.support.pictures import new_figure, save

KINDS = {"generated": "tg128", "prompt": "pp512"}
SHOWN = ("foreseen", "measured", "error")


def foreseen_table(path: Path) -> str:
    """What was run, the error of all, and each candidate."""
    found = json.loads(path.read_text(encoding="utf-8"))
    machine, rows = found["machine"], found["rows"]
    errors = {kind: [abs(error(row[kind])) for row in rows] for kind in KINDS}
    said = "; ".join(
        f"{name}: median {median(errors[kind]):.0%}, at most {max(errors[kind]):.0%}" for kind, name in KINDS.items()
    )
    headings = (
        "candidate",
        *(f"{name} {what}" for name in KINDS.values() for what in ("foreseen", "measured", "error")),
    )
    lines = [(f"`{row['candidate']}`", *(cell for kind in KINDS for cell in cells(row[kind]))) for row in rows]
    return (
        f"{found['model']} on {machine['processor']}, {machine['cores']} cores, {found['date']}, "
        f"polyquant-kernels {machine['versions'].get('polyquant-kernels', '-')}, torch {machine['versions']['torch']}. "
        f"Errors of {len(rows)} candidates: {said}.\n\n{markdown(headings, lines)}"
    )


def error(pair: Mapping[str, float]) -> float:
    """What was foreseen over what was measured, less one."""
    return pair["foreseen"] / pair["measured"] - 1


def cells(pair: Mapping[str, float]) -> tuple[str, str, str]:
    """Of one kind of speed."""
    return (f"{pair['foreseen']:.0f}", f"{pair['measured']:.0f}", f"{error(pair):+.0%}")


def foreseen_picture(path: Path) -> str:
    """The SVG: each candidate's speed, foreseen against measured; on the line they are the same."""
    found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    figure = new_figure(8, 4)
    for axes, (kind, name) in zip(figure.subplots(1, 2), KINDS.items(), strict=True):
        pairs = [row[kind] for row in found["rows"]]
        ends = [0, 1.1 * max(value for pair in pairs for value in pair.values())]
        axes.plot(ends, ends, color="0.6", linewidth=1)
        axes.fill_between(ends, [0.88 * end for end in ends], [1.12 * end for end in ends], color="0.93", linewidth=0)
        axes.scatter([pair["measured"] for pair in pairs], [pair["foreseen"] for pair in pairs], s=14)
        axes.set(xlim=ends, ylim=ends, xlabel=f"{name} measured, tokens/s", ylabel=f"{name} foreseen, tokens/s")
        axes.set_aspect("equal")
    figure.suptitle(f"{found['model']}, {found['machine']['processor']}, {found['date']}; shaded: within 12 %", size=9)
    with TemporaryDirectory() as folder:
        return save(figure, Path(folder) / "foreseen.svg").read_text(encoding="utf-8")
