"""The commands. Each loads what it needs when it runs, so that listing backends stays quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import polyquant
from polyquant import api
from polyquant.cli import authoring, caching, choosing, environments
from polyquant.cli.arguments import Json, MaxTokens, Model, Temperature
from polyquant.cli.chatting import chat
from polyquant.cli.comparing import compare
from polyquant.cli.converting import convert
from polyquant.cli.elsewhere import Commands
from polyquant.cli.loading import load_model
from polyquant.cli.options import Loading, complete_backend, loads_models, spread
from polyquant.cli.output import say, say_piece
from polyquant.cli.planning import plan, recommend
from polyquant.cli.reporting import report
from polyquant.cli.searching import BACKEND, search
from polyquant.cli.serving import serve
from polyquant.cli.training import finetune, merge
from polyquant.comparison.options import CompareOptions
from polyquant.errors import ConfigError
from polyquant.registry.installed import registry
from polyquant.searching.options import SearchOptions
from polyquant.serving.options import ServeOptions


def _version(wanted: bool) -> None:
    if wanted:
        say(polyquant.__version__)
        raise typer.Exit


def build(backend: str | None) -> typer.Typer:
    """The command line, with the options of `backend` where one is named."""
    app = typer.Typer(
        cls=Commands,
        help="Quantize Hugging Face language models: choose a backend, load, verify, run.",
        epilog="Options of a backend: polyquant run --backend NAME --help",
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    app.command()(backends)
    app.command()(doctor)
    app.command()(report)
    app.command()(convert)
    authoring.register(app)
    environments.register(app)
    caching.register(app)
    app.command()(recommend)
    for command in (plan, load, verify, run, chat, quantize, finetune, merge):
        app.command()(loads_models(command, backend))
    app.command()(loads_models(spread(serve, "options", ServeOptions, "How to serve"), backend))
    app.command()(loads_models(spread(search, "how", SearchOptions, "How to search"), backend or BACKEND, chooses=True))
    app.command()(spread(compare, "options", CompareOptions, "How to compare"))
    return app


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
    ] = False,
) -> None: ...


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
    json: Json = False,
) -> None:
    """List installed backends and what they can do.

    Example: polyquant backends --bits 4 --device cpu --on-the-fly
    """
    query = {name: value for name, value in locals().items() if name != "json" and value is not None}
    selection = api.backends(**query)
    from polyquant.cli import show

    show.backends_json(selection) if json else show.backends(selection, bool(query))
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

    diagnoses = api.doctor(backend, device=device, seconds=seconds)
    show.records_json(diagnoses) if json else show.doctor(diagnoses)
    if not all(diagnosis.runs for diagnosis in diagnoses):
        raise typer.Exit(1)


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

    report = api.verify(load_model(model, loading))
    show.verification_json(report) if json else show.verification(report)
    if not report.passed:
        raise typer.Exit(1)


def run(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.", show_default=False)],
    loading: Loading,
    max_new_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
) -> None:
    """Load a model and continue a text, token by token.

    Without a backend, a dense model is quantized as `polyquant recommend MODEL --needs on_the_fly` puts first.

    Example: polyquant run builtin:smollm2 -b bitsandbytes:nf4 "The capital of France is"
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    loaded = load_model(model, choosing.with_backend(model, loading))
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    for piece in loaded.stream(text, max_new_tokens=max_new_tokens, **sampling):
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
        raise ConfigError(
            f"name the backend to quantize with: --backend, one of {', '.join(registry().names()) or 'none installed'}"
        )
    from polyquant.plugin.calibration import read_calibration
    from polyquant.support.outputs import require_free

    texts = read_calibration(calibration) if calibration else None
    require_free(out, overwrite=overwrite, keeps=(calibration,) if calibration else ())
    options = {**loading.options, "progress": sys.stderr.isatty()}
    path = api.quantize(model, loading.backend, out, calibration=texts, overwrite=overwrite, **options)
    say(f"wrote {path}: {sum(file.stat().st_size for file in path.rglob('*') if file.is_file()) / 2**20:.0f} MiB")
