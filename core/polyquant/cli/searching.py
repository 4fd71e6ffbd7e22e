"""`polyquant search`, and what it prints."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import polyquant
from polyquant.cli.arguments import Json, Loading, Model

if TYPE_CHECKING:
    from polyquant.searching.records import Assignment

BACKEND = "gguf"  # where none is named


def search(
    model: Model,
    memory: Annotated[
        str, typer.Option(help="Bytes that the stored weights may take, such as 100MiB.", show_default=False)
    ],
    loading: Loading,
    how: dict[str, Any],
    calibration: Annotated[
        Path | None, typer.Option(help="Text file that the layers are measured on.", dir_okay=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write the checkpoint to.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of polyquant.")] = False,
    json: Json = False,
) -> None:
    """Find the format of each layer that brings a model closest to the dense one in a budget of bytes.

    Each part of the model is quantized alone and measured, then the best of all assignments is, against each format for
    everything. What was measured is kept: the same command goes on after an interruption, and another budget is quick.

    Example: polyquant search builtin:smollm2 --memory 100MiB --formats Q4_0,Q5_0,Q8_0 --out smollm2-mixed
    """
    from polyquant.cli.output import print_json
    from polyquant.cli.progress import showing_steps
    from polyquant.plugin.calibration import read_calibration

    texts = read_calibration(calibration) if calibration else ()
    with showing_steps(model) as progress:
        found = polyquant.search(
            model, memory, loading.backend or BACKEND, out=out, overwrite=overwrite, calibration=texts,
            progress=progress, **how, revision=loading.revision, **loading.options,
        )  # fmt: skip
    print_json(found) if json else _show(found)


def _show(found: Assignment) -> None:
    from rich.table import Table

    from polyquant.cli.show import _notes, console
    from polyquant.support.sizes import size

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold underline")
    for heading in ("formats", "weights", "KL", "same top", ""):
        table.add_column(heading, justify="left" if heading in ("formats", "") else "right")
    mixed = ("found", found.stored_bytes, found.quality, f"predicted {found.kl_predicted:.4f}")
    rows = [mixed, *((each.format, each.stored_bytes, each.quality, "" if each.fits else "too big")
                     for each in found.uniform)]  # fmt: skip
    for name, count, quality, remark in sorted(rows, key=lambda row: row[1]):
        style = "bold" if name == "found" else "dim" if remark == "too big" else ""
        kl = f"{quality.kl_mean:.4f} ± {quality.kl_standard_error:.4f}"
        table.add_row(name, size(count), kl, f"{quality.top1:.1%}", remark, style=style)
    console.print(table)
    kinds = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold underline")
    for heading in ("layers", "have"):
        kinds.add_column(heading, overflow="fold")
    for name, counts in _kinds(found).items():
        kinds.add_row(name, ", ".join(f"{count} {chosen}" for chosen, count in counts.most_common()))
    console.print(kinds)
    _notes(found.notes)
    if found.checkpoint:
        console.print(f"wrote {found.checkpoint}")
    console.print(f"make it{' again' if found.checkpoint else ''}: {found.command}", soft_wrap=True)


def _kinds(found: Assignment) -> dict[str, Counter[str]]:
    """Kind of layer -> how many have each format."""
    from polyquant.modules import kind_of

    kinds: dict[str, Counter[str]] = {}
    for part in found.assigned:
        for module in part.modules:
            kinds.setdefault(kind_of(module), Counter())[part.format] += 1
    return kinds
