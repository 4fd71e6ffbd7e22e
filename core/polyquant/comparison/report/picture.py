"""A comparison as a picture that stands alone: every point named; model, machine and date inside it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from polyquant.comparison.records import Run
from polyquant.comparison.report import measured_on
from polyquant.comparison.report.column import Column
from polyquant.comparison.report.columns import AXES
from polyquant.comparison.report.names import Box, placed
from polyquant.comparison.report.plot import KL, frontiers, group
from polyquant.comparison.report.rows import plain_rows
from polyquant.errors import ConfigError
from polyquant.support.pictures import new_figure, require_suffix, save

Against = Literal["memory", "speed"]
WIDTH, HEIGHT, FONT_SIZE = 9.6, 6.0, 9.0  # inches, and points
GROWTH = 1.15  # in height, where the names have no room
LONG = 22  # letters: names of more are broken
ZERO = 1e-7  # nats: below it a candidate computes what the reference does
QUIET = "#5b6570"


class Mark(NamedTuple):
    """How points of a kind are drawn, as in the page."""

    name: str
    symbol: str  # matplotlib's
    colour: str


MARKS: Mapping[str, Mark] = {
    "low": Mark("up to 3.5 bits", "^", "#d4720b"),
    "middle": Mark("3.5 to 6 bits", "o", "#3183d6"),
    "high": Mark("over 6 bits", "s", "#1a9a72"),
    "dense": Mark("dense", "D", "#868e98"),
}
"""By what `plot.group` calls them."""


class Point(NamedTuple):
    """A candidate that was measured."""

    label: str
    group: str
    x: float
    y: float  # nats
    error: float  # its standard error
    best: bool  # no other is better in both


def draw(run: Run, path: Path, against: Against = "memory") -> Path:
    """Write KL against bytes, or generated tokens a second, as .svg, .png or .pdf.

    Raises ConfigError where no candidate has both figures, or for another kind of file, and EnvironmentProblem without
    matplotlib.
    """
    require_suffix(path)
    return save(figure_of(run, against), path)


def figure_of(run: Run, against: Against) -> Any:
    """The picture as a matplotlib Figure. Raises as `draw` does."""
    axis = next(column for column in AXES if column.goal == against)
    points = points_of(run, axis)
    if not points:
        raise ConfigError(f"no candidate of this comparison has both {KL.heading} and {axis.heading}: nothing to draw")
    figure = new_figure(WIDTH, HEIGHT)
    axes = figure.subplots()
    floor = min((point.y for point in points if point.y > ZERO), default=1e-3) / 3
    _draw_points(axes, points, floor)
    _draw_frontier(axes, [point for point in points if point.best], floor, falls=axis.better == "lower")
    axes.set_yscale("log")
    axes.margins(x=0.16, y=0.1)
    _furnish(axes, run, axis, floor, zero=any(point.y <= ZERO for point in points))
    _name_points(figure, axes, points, floor)
    return figure


def points_of(run: Run, axis: Column) -> list[Point]:
    """Every candidate with a KL and a figure of `axis`, less the reference, in the order of the comparison."""
    best = set(frontiers(run)[axis.key])
    scale = 2**20 if axis.key.endswith("_bytes") else 1
    return [
        Point(
            label=values["candidate"] + (f" ({row.status})" if row.status != "done" else ""), group=group(values),
            x=values[axis.key] / scale, y=values[KL.key], error=values[KL.error] or 0.0, best=index in best,
        )
        for index, (row, values) in enumerate(zip(run.rows, plain_rows(run), strict=True))
        if not run.is_reference(row) and None not in (values[axis.key], values[KL.key])
    ]  # fmt: skip


def _draw_points(axes: Any, points: Sequence[Point], floor: float) -> None:
    for kind, mark in MARKS.items():
        own = [point for point in points if point.group == kind]
        if not own:
            continue
        heights = [max(point.y, floor) for point in own]
        below = [min(point.error, height * 0.9) for point, height in zip(own, heights, strict=True)]
        axes.errorbar(
            [point.x for point in own], heights, yerr=(below, [point.error for point in own]), fmt=mark.symbol,
            color=mark.colour, markersize=8, elinewidth=1, label=mark.name, zorder=3,
        )  # fmt: skip


def _draw_frontier(axes: Any, best: Sequence[Point], floor: float, *, falls: bool) -> None:
    ordered = sorted(best, key=lambda point: point.x)
    axes.step(
        [point.x for point in ordered], [max(point.y, floor) for point in ordered], where="post" if falls else "pre",
        color=MARKS["dense"].colour, linestyle=":", linewidth=1.2, zorder=1,
    )  # fmt: skip


def _furnish(axes: Any, run: Run, axis: Column, floor: float, *, zero: bool) -> None:
    """Titles, and below them what was measured on what."""
    axes.set_xlabel(f"{axis.axis_title}, MiB" if axis.key.endswith("_bytes") else axis.axis_title)
    axes.set_ylabel(f"{KL.heading} to {run.setting.reference}, {KL.unit} (lower is closer)")
    model = Path(run.setting.model).name or run.setting.model
    axes.set_title(f"{model}: quality against {axis.axis.lower()}", loc="left", fontweight="bold")
    if zero:
        axes.axhline(floor, color="#d8dde3", linewidth=0.8, zorder=0)
        axes.annotate("0", (0, floor), xycoords=("axes fraction", "data"), textcoords="offset points", xytext=(-14, -4))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(which="major", color="#eef1f4", zorder=0)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize="small", loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=4)
    said = [f"{measured_on.one_line(run)}. Bars are one standard error.", *(f"Note: {note}." for note in run.notes)]
    axes.annotate(
        "\n".join(line for each in said for line in textwrap.wrap(each, 150)), (0, 0), xycoords="axes fraction",
        textcoords="offset points", xytext=(0, -36), va="top", fontsize=7, color=QUIET,
    )  # fmt: skip


def _name_points(figure: Any, axes: Any, points: Sequence[Point], floor: float) -> None:
    """Each point's name beside it, or further off with a line to it; the figure grows until all have room."""
    labels = [_broken(point.label) for point in points]
    weights = ["bold" if point.best else "normal" for point in points]
    named = None
    while named is None:
        figure.draw_without_rendering()  # so that the scale is known
        pixels = figure.dpi / 72
        places = [axes.transData.transform((point.x, max(point.y, floor))) / pixels for point in points]
        sizes = [_size(axes, label, weight, pixels) for label, weight in zip(labels, weights, strict=True)]
        named = placed([(float(x), float(y)) for x, y in places], sizes, Box(*(axes.bbox.extents / pixels)))
        if named is None:
            figure.set_size_inches(WIDTH, figure.get_figheight() * GROWTH)
    for point, label, weight, (x, y), name in zip(points, labels, weights, places, named, strict=True):
        middle = name.box.middle
        axes.annotate(
            label, (point.x, max(point.y, floor)), textcoords="offset points", va="center", ha="center",
            xytext=(middle[0] - x, middle[1] - y), fontsize=FONT_SIZE, fontweight=weight, zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": "#9aa4ae", "linewidth": 0.6} if name.leader else None,
        ).set_in_layout(False)  # fmt: skip


def _size(axes: Any, label: str, weight: str, pixels: float) -> tuple[float, float]:
    """Width and height of a name, in points."""
    text = axes.text(0, 0, label, fontsize=FONT_SIZE, fontweight=weight)
    extent = text.get_window_extent()
    text.remove()
    return extent.width / pixels, extent.height / pixels


def _broken(label: str) -> str:
    """A long name in lines, an option each."""
    return label.replace(",", ",\n") if len(label) > LONG else label
