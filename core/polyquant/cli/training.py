"""The commands that train adapters and merge them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import polyquant
from polyquant.cli.arguments import Json, Loading, Model
from polyquant.cli.output import print_json


def finetune(
    model: Model,
    data: Annotated[str, typer.Option(help="JSONL, a text file, or the name of a dataset.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the adapter.", show_default=False)],
    loading: Loading,
    training: dict[str, Any],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of polyquant.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew where a run was left unfinished.")] = False,
    json: Json = False,
) -> None:
    """Train LoRA adapters on a quantized base. Killed or interrupted, the same command goes on.

    Example: polyquant finetune builtin:smollm2 -b bitsandbytes --bits 4 --data train.jsonl --out adapter --steps 30
    """
    from polyquant.cli import show
    from polyquant.cli.progress import showing_training

    with nullcontext() if json else showing_training() as progress:
        tuned = polyquant.finetune(
            model, data, out, backend=loading.backend, overwrite=overwrite, restart=restart, progress=progress,
            revision=loading.revision, **training, **loading.options,
        )  # fmt: skip
    print_json(tuned) if json else show.tuned(tuned)


def merge(
    model: Model,
    adapter: Annotated[str, typer.Option(help="Folder or hub name of the adapter.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    into: Annotated[
        Literal["dense", "dequantized", "requantized"],
        typer.Option(help="Into the dense model, the dequantized base, or the dense model quantized again."),
    ],
    loading: Loading,
    threshold: Annotated[float, typer.Option(help="Largest KL to base and adapter, nats.", min=0.0)] = 0.1,
    force: Annotated[bool, typer.Option("--force", help="Write it however far it is.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of polyquant.")] = False,
    json: Json = False,
) -> None:
    """Merge an adapter into its base; compared with base and adapter before anything is written.

    Example: polyquant merge builtin:smollm2 --adapter adapter --into dequantized --out merged
    """
    from polyquant.cli import show

    with show.loading(model):
        quality = polyquant.merge(
            model, adapter, out, into, backend=loading.backend, threshold=threshold, force=force, overwrite=overwrite,
            **{name: value for name, value in loading.options.items() if value not in ("", None)},
        )  # fmt: skip
    print_json(quality) if json else show.merged(out, quality)
