"""The commands that load a model, and show it, prove it, run it or write it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import polyquant
from polyquant.cli import choosing
from polyquant.cli.arguments import Json, Loading, MaxTokens, Model, Temperature, sampling
from polyquant.cli.loading import load_model
from polyquant.cli.output import say, say_piece
from polyquant.cli.tables import read_table
from polyquant.errors import ConfigError
from polyquant.models.structured import require_llguidance


def load(model: Model, loading: Loading, json: Json = False) -> None:
    """Load a model and show what it takes.

    Example: polyquant load builtin:smollm2 --backend bitsandbytes --bits 4
    """
    from polyquant.cli import show

    loaded = load_model(model, loading)
    show.loaded_json(loaded) if json else show.loaded(loaded)


def verify(model: Model, loading: Loading, json: Json = False) -> None:
    """Load a model and prove what you got: bytes, coverage, layers, outputs. Exit code 1 where a check fails.

    Example: polyquant verify builtin:smollm2 --backend bitsandbytes --quant-type nf4
    """
    from polyquant.cli import show

    report = polyquant.verify(load_model(model, loading))
    show.verification_json(report) if json else show.verification(report)
    if not report.passed:
        raise typer.Exit(1)


def run(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.", show_default=False)],
    loading: Loading,
    max_new_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    schema: Annotated[
        Path | None, typer.Option(help="File with a JSON schema, which the text that follows fits.", dir_okay=False)
    ] = None,
) -> None:
    """Load a model and continue a text, token by token.

    Without a backend, a dense model is quantized as `polyquant recommend MODEL --needs on_the_fly` puts first.

    Example: polyquant run builtin:smollm2 -b bitsandbytes:nf4 "The capital of France is"
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    fits = {}
    if schema:
        require_llguidance()
        fits["schema"] = read_table(schema, holding="a JSON schema")
    loaded = load_model(model, choosing.with_backend(model, loading))
    for piece in loaded.stream(text, max_new_tokens=max_new_tokens, **sampling(temperature), **fits):
        say_piece(piece)
    say()


def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    loading: Loading,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text file, one sample a paragraph, for backends that calibrate.", dir_okay=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of polyquant.")] = False,
) -> None:
    """Write a quantized checkpoint: load, verify, save; all or nothing.

    Example: polyquant quantize builtin:smollm2 --backend bitsandbytes --quant-type nf4 --out smollm2-nf4
    """
    if loading.backend is None:
        from polyquant.registry.installed import registry

        raise ConfigError(
            f"name the backend to quantize with: --backend, one of {', '.join(registry().names()) or 'none installed'}"
        )
    from polyquant.plugin.calibration import read_calibration
    from polyquant.support.outputs import require_free

    texts = read_calibration(calibration) if calibration else None
    require_free(out, overwrite=overwrite, keeps=(calibration,) if calibration else ())
    options = {**loading.options, "progress": sys.stderr.isatty()}
    path = polyquant.quantize(model, loading.backend, out, calibration=texts, overwrite=overwrite, **options)
    say(f"wrote {path}: {sum(file.stat().st_size for file in path.rglob('*') if file.is_file()) / 2**20:.0f} MiB")
