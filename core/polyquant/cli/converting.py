"""The command that writes a quantized checkpoint in another format."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import polyquant
from polyquant.cli.arguments import Json, Model, complete_backend
from polyquant.errors import PolyquantError

if TYPE_CHECKING:
    from polyquant.converting.records import Conversion


def complete_target(incomplete: str) -> list[str]:
    """Backends that something is converted to."""
    return [name for name in complete_backend(incomplete) if _unpacks(name)]


def _unpacks(name: str) -> bool:
    from polyquant.registry.installed import registry

    try:
        return registry().implements(name, "unpack")
    except PolyquantError:
        return False


def convert(
    model: Model,
    to: Annotated[
        str,
        typer.Option(
            help="Backend whose format it gets, or backend:option=value; else options follow from the weights.",
            autocompletion=complete_target, show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    backend: Annotated[
        str | None,
        typer.Option("--backend", "-b", help="Reads the checkpoint, which else names its own.",
                     autocompletion=complete_backend),
    ] = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Where the format has no place for the weights, round them again.")
    ] = False,
    max_kl: Annotated[float, typer.Option(help="Requantized: largest KL to the source, in nats.", min=0)] = 0.05,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Requantizing: text file, one sample a paragraph, for backends that calibrate.",
                     dir_okay=False),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub repository.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the repository's own Python code.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of polyquant.")] = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Write a quantized checkpoint in another format, without rounding again: codes and scales get other names.

    What is written is read back and compared, layer by layer; all or nothing.

    Example: polyquant convert model-gptq --to compressed-tensors --out model-vllm

    Example: polyquant convert model-gptq --to gguf:type=Q4_1 --out model-gguf
    """
    from polyquant.support.outputs import require_free

    require_free(out, overwrite=overwrite, keeps=(calibration,) if calibration else ())
    from polyquant.cli import show
    from polyquant.cli.output import print_json
    from polyquant.plugin.calibration import read_calibration

    texts = read_calibration(calibration) if calibration else None
    with show.loading(model, bars=True):
        conversion = polyquant.convert(
            model, to, out, backend=backend, overwrite=overwrite, requantize=requantize, max_kl=max_kl,
            calibration=texts, progress=sys.stderr.isatty(), revision=revision, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    print_json(conversion) if json else _show(conversion)


def _show(conversion: Conversion) -> None:
    from rich.table import Table

    from polyquant.cli import show
    from polyquant.cli.output import say
    from polyquant.support.sizes import size

    said = ", ".join(f"{name}={value}" for name, value in conversion.options.items() if name != "layers")
    say(f"{conversion.source_backend} -> {conversion.target_backend} ({said})")
    if conversion.layers:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold underline")
        for heading in ("layer", "shape", "was", "read back", "largest difference", "largest weight"):
            table.add_column(heading, overflow="fold")
        for layer in conversion.layers:
            same = "bit-equal" if layer.exact else "differs"
            difference = "0" if layer.exact else f"{layer.largest_difference:.3g}"
            rows, columns = layer.shape
            table.add_row(
                layer.name, f"{rows} x {columns}", layer.scheme, same, difference, f"{layer.largest_weight:.3g}"
            )
        show.console.print(table)
    for note in conversion.notes:
        say(f"note: {note}")
    if conversion.requantized:
        say(f"rounded again: {conversion.kl_mean:.4g} nats (KL) from the source")
    else:
        equal = sum(layer.exact for layer in conversion.layers)
        rest = f"; the others by {conversion.largest_relative_difference:.2g} of their largest weight at most"
        say(f"{equal} of {len(conversion.layers)} layers are bit-equal{'' if conversion.exact else rest}")
    say(f"wrote {conversion.out}: {size(conversion.checkpoint_bytes)}")
