"""The commands that say which backends there are, and whether they run here."""

from __future__ import annotations

from typing import Annotated

import typer

import polyquant
from polyquant.cli.arguments import Json, complete_backend
from polyquant.cli.output import print_json


def backends(
    bits: Annotated[float | None, typer.Option(help="Can quantize to so many bits.")] = None,
    scheme: Annotated[str | None, typer.Option(help="Knows a scheme, such as nf4.")] = None,
    device: Annotated[str | None, typer.Option(help="Runs on cpu, cuda, xpu, mps.")] = None,
    quant_method: Annotated[str | None, typer.Option(help="Reads checkpoints of this method.")] = None,
    on_the_fly: Annotated[bool | None, typer.Option(help="Quantizes while loading.", show_default=False)] = None,
    needs_calibration: Annotated[bool | None, typer.Option(help="Needs sample text.", show_default=False)] = None,
    saves: Annotated[bool | None, typer.Option(help="Writes checkpoints.", show_default=False)] = None,
    trains: Annotated[bool | None, typer.Option(help="Adapters train on it.", show_default=False)] = None,
    compiles: Annotated[bool | None, typer.Option(help="torch.compile works.", show_default=False)] = None,
    offloads: Annotated[bool | None, typer.Option(help="Offloads to the CPU.", show_default=False)] = None,
    option: Annotated[str | None, typer.Option(help="Has an option of this name, such as group_size.")] = None,
    json: Json = False,
) -> None:
    """List installed backends and what they can do.

    Example: polyquant backends --bits 4 --device cpu --on-the-fly
    """
    query = {name: value for name, value in locals().items() if name != "json" and value is not None}
    selection = polyquant.backends(**query)
    from polyquant.cli import show_backends as show

    show.as_json(selection) if json else show.as_table(selection, filtered=bool(query))
    if not selection:
        raise typer.Exit(1)


def doctor(
    backend: Annotated[
        str | None, typer.Argument(help="One backend; all where left out.", autocompletion=complete_backend)
    ] = None,
    device: Annotated[str, typer.Option(help="The device to check for.")] = "auto",
    seconds: Annotated[
        float | None,
        typer.Option(min=0.1, help="How long each may take to answer; 60 unless told, 240 in its own environment."),
    ] = None,
    json: Json = False,
) -> None:
    """Check whether backends can run on this machine, with the command that fixes each problem.

    Example: polyquant doctor bitsandbytes --device cuda
    """
    from polyquant.cli import show

    diagnoses = polyquant.doctor(backend, device=device, seconds=seconds)
    print_json(diagnoses) if json else show.doctor(diagnoses)
    if not all(diagnosis.runs for diagnosis in diagnoses):
        raise typer.Exit(1)
