"""The command that shows a comparison, writes its report, and compares two; and the tables of both in a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer

import polyquant
from polyquant.cli.arguments import Json
from polyquant.errors import ConfigError, EnvironmentProblem

if TYPE_CHECKING:
    from polyquant.comparison.records import Run
    from polyquant.comparison.report.difference import Difference

WIDE = 112  # columns of a terminal that has room for every figure


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a comparison, or its comparison.json.", show_default=False)],
    other: Annotated[
        Path | None, typer.Argument(help="A later one: show what changed from the first to it.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write; for one comparison, report.html in its folder if left out.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="A picture for a talk or a page: .svg, .png or .pdf.", dir_okay=False)
    ] = None,
    against: Annotated[
        Literal["memory", "speed"], typer.Option(help="What the picture draws KL against: stored bytes, or tokens/s.")
    ] = "memory",
    json: Json = False,
) -> None:
    """Show a comparison and write its report again; or show what changed between two, beyond noise.

    With two, the exit code is 1 where something is worse than it was.

    Examples: polyquant report before after ·
    polyquant report comparison --picture comparison.svg --against speed
    """
    from polyquant.cli.output import print_json
    from polyquant.comparison.report.exports import as_plain
    from polyquant.comparison.report.page import write_report

    if picture is not None and other is not None:
        raise ConfigError("--picture draws one comparison; leave it out, or the second folder")
    comparison = polyquant.read_comparison(run)
    if other is None:
        if picture is not None:
            from polyquant.cli.output import say
            from polyquant.comparison.report.picture import draw

            say(f"wrote {draw(comparison, picture, against)}", error=True)
        written = None
        if out or not json:
            try:
                written = write_report(comparison, out or (run if run.is_dir() else run.parent) / "report.html")
            except EnvironmentProblem:  # of the page alone
                show_comparison(comparison)
                raise
        print_json(as_plain(comparison)) if json else show_comparison(comparison, written)
        return
    difference = polyquant.difference(comparison, other)
    written = difference.report(out) if out else None
    if json:
        print_json({"worsened": difference.worsened, "changed": difference.changed, **msgspec.to_builtins(difference)})
    else:
        show_difference(difference, written)
    if difference.worsened:
        raise typer.Exit(1)


def show_comparison(run: Run, written: Path | None = None) -> None:
    """A row a candidate, closest to the reference first; below, failures with their reasons, notes, and the report."""
    from rich.table import Table
    from rich.text import Text

    from polyquant.cli.show import console
    from polyquant.cli.terminal import styled
    from polyquant.comparison.report import measured_on
    from polyquant.comparison.report.column import MARK
    from polyquant.comparison.report.columns import COLUMNS, GOALS, shown
    from polyquant.comparison.report.plot import frontiers
    from polyquant.comparison.report.rows import by_quality, first_line, plain_rows

    best = {run.rows[index].candidate.label for index in frontiers(run)[GOALS["memory"].key]}
    wide = console.width >= WIDE
    columns = shown(COLUMNS, "terminal", *(("wide terminal",) if wide else ()))
    table = Table(box=None, pad_edge=False, padding=(0, 2 if wide else 1, 0, 0), header_style="bold underline")
    table.add_column("candidate", overflow="fold")
    for column in columns:
        heading = column.short or column.heading
        table.add_column(f"{heading}, {column.unit}" if column.unit else heading, justify="right", no_wrap=True)
    rows = by_quality(plain_rows(run))
    for values in rows:
        if values["status"] in ("done", "check failed"):
            name = values["candidate"]
            style = "bold" if name in best else "red" if values["status"] == "check failed" else ""
            table.add_row(Text(name, style=style), *(column.text(values) for column in columns))
    if table.row_count:
        console.print(table)
        console.print(styled("[bold]bold[/]: no other is both smaller and closer to the reference"))
    for values in rows:
        if values["status"] != "done":
            reason = first_line(values["reason"])
            console.print(styled("[red]{}[/] {}: {}", values["status"], values["candidate"], reason))
    console.print(measured_on.one_line(run), style="dim")
    if beside := measured_on.other_work(run):
        console.print(styled("[yellow]{}[/] {}", MARK, beside))
    _show_behaviour(rows)
    for note in run.notes:
        console.print(f"note: {note}")
    _show_path(written)


def _show_behaviour(rows: list[dict[str, Any]]) -> None:
    """How candidates answered the prompts, where they were asked."""
    from rich.table import Table
    from rich.text import Text

    from polyquant.cli.show import console
    from polyquant.comparison.report.behaviour import FIGURES

    asked = [values for values in rows if values.get(FIGURES[0].key) is not None]
    if not asked:
        return
    table = Table(box=None, pad_edge=False, header_style="underline", title_justify="left")
    table.title = "answers to 64 prompts, beside the reference's (intervals of 95 %)"
    table.add_column("candidate", overflow="fold")
    columns = [figure for figure in FIGURES if "page" in figure.places]
    for column in columns:
        table.add_column(column.heading, justify="right")
    for values in asked:
        table.add_row(Text(values["candidate"]), *(column.text(values) for column in columns))
    console.print(table)


def show_difference(difference: Difference, written: Path | None = None) -> None:
    """What changed beyond noise, and where the two were not measured alike."""
    from rich.table import Table

    from polyquant.cli.show import console
    from polyquant.comparison.report.difference_tables import sections, summary

    for section in sections(difference):
        if not section["rows"]:
            continue
        table = Table(title=section["heading"], title_justify="left", title_style="bold", box=None, pad_edge=False)
        table.caption, table.caption_justify = section["caption"] or None, "left"
        for heading in section["headings"]:
            table.add_column(heading, overflow="fold", header_style="underline", no_wrap=heading == "figure")
        for row in section["rows"]:
            table.add_row(*row["cells"], style="red" if row["worse"] else "")
        console.print(table)
        console.print()
    console.print(summary(difference))
    _show_path(written)


def _show_path(written: Path | None) -> None:
    from polyquant.cli.show import console

    if written:
        console.print(f"report: {written}", soft_wrap=True)
