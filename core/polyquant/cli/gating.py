"""`polyquant gate`: a comparison held to limits, with an exit code for CI."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

import polyquant
from polyquant.cli.arguments import Json

if TYPE_CHECKING:
    from polyquant.comparison.gate import GateResult

STYLES = {"failed": "red", "within error": "yellow", "passed": ""}


def gate(
    limits: dict[str, Any],
    run: Annotated[Path, typer.Argument(help="Folder of a comparison, or its comparison.json.", show_default=False)],
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            "--candidate", "-c", help="A candidate by its name; repeat it. All but the reference if left out."
        ),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="An earlier comparison: what is worse than there, beyond noise, fails.")
    ] = None,
    json: Json = False,
) -> None:
    """Hold a comparison to limits, for CI. Exit code 0: passed; 1: failed, by candidate and figure; 2: bad input.

    A figure fails where its whole interval is beyond the limit; with --strict, where it is not whole within.

    Examples: polyquant gate comparison --max-kl 0.05 --max-bytes 6GiB ·
    polyquant gate tonight --against yesterday
    """
    from polyquant.cli.output import print_json

    result = polyquant.read_comparison(run).gate(**limits, candidates=candidate or (), against=against)
    if json:
        print_json({"passed": result.passed, **msgspec.to_builtins(result)})
    else:
        show_gate(result)
    if not result.passed:
        raise typer.Exit(1)


def show_gate(result: GateResult) -> None:
    """What failed first; then notes and the verdict."""
    from rich.table import Table

    from polyquant.cli.show import console

    look = result.look()
    table = Table(box=None, pad_edge=False, header_style="bold underline")
    for heading in look.headings:
        table.add_column(heading, overflow="fold")
    for row in look.rows:
        table.add_row(*row, style=STYLES[row[0]])
    console.print(table)
    for note in look.notes:
        console.print(f"note: {note}")
    console.print(look.sentence)
