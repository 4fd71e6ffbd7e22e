"""The command that shows a comparison, writes its report, and compares two; and the tables of both in a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

import polyquant
from polyquant.cli.arguments import Json
from polyquant.errors import EnvironmentProblem

if TYPE_CHECKING:
    from polyquant.comparison.records import Comparison
    from polyquant.comparison.report.difference import Difference

WIDE = 112  # columns of a terminal that has room for every figure
HEADINGS = ("KL, nats", "top-1", "ppl ratio", "stored", "of bf16", "prompt tok/s", "gen. tok/s")
ONLY_WIDE = ("ppl ratio", "of bf16", "prompt tok/s")


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a comparison, or its comparison.json.", show_default=False)],
    other: Annotated[
        Path | None, typer.Argument(help="A later one: show what changed from the first to it.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write; for one comparison, report.html in its folder if left out.")
    ] = None,
    json: Json = False,
) -> None:
    """Show a comparison and write its report again; or show what changed between two, beyond noise.

    With two, the exit code is 1 where something is worse than it was.

    Example: polyquant report before after
    """
    from polyquant.cli.show import print_json
    from polyquant.comparison.report.difference import difference
    from polyquant.comparison.report.page import write_difference, write_report
    from polyquant.comparison.report.rows import as_plain

    comparison = _read(run)
    if other is None:
        written = None
        if out or not json:
            try:
                written = write_report(comparison, out or (run if run.is_dir() else run.parent) / "report.html")
            except EnvironmentProblem:  # of the page alone
                show_comparison(comparison)
                raise
        print_json(as_plain(comparison)) if json else show_comparison(comparison, written)
        return
    found = difference(comparison, _read(other))
    written = write_difference(found, out) if out else None
    if json:
        print_json({"worsened": found.worsened, "changed": found.changed, **msgspec.to_builtins(found)})
    else:
        show_difference(found, written)
    if found.worsened:
        raise typer.Exit(1)


def _read(path: Path) -> Comparison:
    """The comparison, which says where it lies now: two of them may come from folders of the same name."""
    return msgspec.structs.replace(polyquant.read_comparison(path), folder=str(path))


def show_comparison(comparison: Comparison, written: Path | None = None) -> None:
    """A row a candidate, closest to the reference first; below, failures with their reasons, notes, and the report."""
    from rich.markup import escape
    from rich.table import Table

    from polyquant.cli.show import console
    from polyquant.comparison.report.plot import frontiers
    from polyquant.comparison.report.rows import by_quality, rows, short
    from polyquant.comparison.report.words import conditions, first_line

    best = {comparison.rows[index].candidate.name for index in frontiers(comparison)["weights_stored_bytes"]}
    shown = [name for name in HEADINGS if console.width >= WIDE or name not in ONLY_WIDE]
    padding = (0, 2 if console.width >= WIDE else 1, 0, 0)
    table = Table(box=None, pad_edge=False, padding=padding, header_style="bold underline")
    table.add_column("candidate", overflow="fold")
    for heading in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    cells = by_quality(rows(comparison))
    for cell in cells:
        if cell["status"] in ("done", "check failed"):
            name, *figures = short(cell)
            style = "bold" if name in best else "red" if cell["status"] == "check failed" else ""
            words = dict(zip(HEADINGS, figures, strict=True))
            table.add_row(f"[{style}]{escape(name)}[/]" if style else escape(name), *(words[each] for each in shown))
    if table.row_count:
        console.print(table)
        console.print("[bold]bold[/]: no other is both smaller and closer to the reference")
    for cell in cells:
        if cell["status"] != "done":
            reason = first_line(cell["reason"])
            console.print(f"[red]{cell['status']}[/] {escape(cell['candidate'])}: {escape(reason)}")
    console.print(conditions(comparison), style="dim", markup=False)
    for note in comparison.notes:
        console.print(f"note: {escape(note)}")
    _say(written)


def show_difference(found: Difference, written: Path | None = None) -> None:
    """What changed beyond noise, and where the two were not measured alike."""
    from rich.markup import escape
    from rich.table import Table

    from polyquant.cli.show import console
    from polyquant.comparison.report.difference_page import sections, summary

    for section in sections(found):
        if not section["rows"]:
            continue
        table = Table(title=section["heading"], title_justify="left", title_style="bold", box=None, pad_edge=False)
        table.caption, table.caption_justify = escape(section["caption"]) or None, "left"
        for heading in section["headings"]:
            table.add_column(heading, overflow="fold", header_style="underline", no_wrap=heading == "figure")
        for row in section["rows"]:
            table.add_row(*map(escape, row["cells"]), style="red" if row["worse"] else "")
        console.print(table)
        console.print()
    console.print(summary(found), markup=False)
    _say(written)


def _say(written: Path | None) -> None:
    from polyquant.cli.show import console

    if written:
        console.print(f"report: {written}", markup=False, soft_wrap=True)
