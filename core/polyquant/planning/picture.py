"""The picture of plans as a file: SVG, a page of HTML that holds it, or another format of matplotlib's."""

from __future__ import annotations

import io
from html import escape
from pathlib import Path

from polyquant.planning.bars import COLOURS, PARTS, bars_of
from polyquant.planning.records import Plan, Plans
from polyquant.support.pictures import new_figure, save
from polyquant.support.sizes import size


def draw(what: Plan | Plans, path: Path) -> None:
    """Write a bar for each candidate, with the budget as a line. Raises EnvironmentProblem without matplotlib."""
    bars = bars_of(what)
    figure = new_figure(9, 1.6 + 0.26 * len(bars))
    axes = figure.subplots()
    names, left = [bar.name for bar in bars], [0.0] * len(bars)
    scale, unit = (2**30, "GiB") if max((bar.total_bytes for bar in bars), default=0) >= 2**30 else (2**20, "MiB")
    for index, part in enumerate(PARTS):
        widths = [bar.parts[index] / scale for bar in bars]
        axes.barh(names, widths, left=left, label=part, color=COLOURS[part], height=0.7)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.axvline(what.memory_bytes / scale, color="#c53030", linestyle="--", label=f"budget {size(what.memory_bytes)}")
    longest = max((bar.total_bytes for bar in bars), default=what.memory_bytes) / scale
    axes.set_xlim(0, 1.05 * max(longest, min(what.memory_bytes / scale, 1.5 * longest)))
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set(xlabel=unit, title=what.model)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        frameon=False,
        fontsize="small",
        ncols=3,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.9 / figure.get_figheight()),
    )
    if path.suffix != ".html":
        save(figure, path)
        return
    svg = io.StringIO()
    figure.savefig(svg, format="svg")
    drawn = svg.getvalue()
    title = escape(f"What {what.model} takes")
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<body>{drawn[drawn.index('<svg') :]}</body></html>"
    )
    path.write_text(page, encoding="utf-8")
