"""The commands that train adapters and merge them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer

import polyquant
from polyquant.cli.arguments import Json, Loading, Model
from polyquant.cli.options import typed_text, usable_card
from polyquant.cli.output import print_json, say
from polyquant.cli.training_file import Arguments, backend_in, read_training_file
from polyquant.errors import ConfigError
from polyquant.finetuning.options import TrainingOptions
from polyquant.options import describe_options


def finetune(
    context: typer.Context,
    loading: Loading,
    training: dict[str, Any],
    model: Annotated[str, typer.Argument(help="Hub name, local folder, or builtin:smollm2.")] = "",
    data: Annotated[str, typer.Option(help="JSONL, a text file, or the name of a dataset.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder for the adapter.", show_default=False)] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML, JSON or TOML file with any of these options, by their names or TRL's; flags win."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of polyquant.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew where a run was left unfinished.")] = False,
    json: Json = False,
) -> None:
    """Train LoRA adapters on a quantized base. Killed or interrupted, the same command goes on.

    Example: polyquant finetune builtin:smollm2 -b bitsandbytes --bits 4 --data train.jsonl --out adapter --steps 30 ·
    polyquant finetune --config train.yaml
    """
    from polyquant.cli import show
    from polyquant.cli.progress import showing_training

    written = _from_file(config, context, loading) if config else {}
    given: dict[str, Any] = {"model": model, "data": data, "out": out, "overwrite": overwrite, "restart": restart}
    values = given | typed_text(Arguments, {name: written.pop(name) for name in given if name in written})
    for name, flag in (("model", "MODEL"), ("data", "--data FILE"), ("out", "--out DIR")):
        if not values[name]:
            where = f", or {name} in {config}" if config else ", or a file of options with --config"
            raise ConfigError(f"no {name} is given: {flag}{where}")
    out = Path(values["out"])
    trained = {name: written.pop(name) for name in TrainingOptions.__struct_fields__ if name in written}
    training = {**typed_text(TrainingOptions, trained), **training}
    backend, revision = written.pop("backend", loading.backend), written.pop("revision", loading.revision)
    options = {**loading.options, **written}
    with nullcontext() if json else showing_training() as progress:
        tuned = polyquant.finetune(
            values["model"], values["data"], out, backend=backend, overwrite=values["overwrite"],
            restart=values["restart"], progress=progress, revision=revision, **training, **options,
        )  # fmt: skip
    if json:
        print_json(tuned)
    else:
        command = run_command(values["model"], backend, {"revision": revision, **options}, tuned.adapter)
        show.tuned(tuned, command)


def _from_file(path: Path, context: typer.Context, loading: Loading) -> dict[str, Any]:
    """The options of the file, less those that flags give, of which it says so."""
    info = usable_card(backend_in(path) or loading.backend)
    own = [option.name for option in describe_options(info.options)] if info else []
    known = {*Arguments.__struct_fields__, *TrainingOptions.__struct_fields__, *loading.options, *own}
    written, fields = read_training_file(path, known)
    for name in list(written):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = name.upper() if name == "model" else f"--{name.replace('_', '-')}"
            say(f"{flag} takes the place of {fields[name]} in {path}", error=True)
            del written[name]
    return written


def run_command(model: str, backend: str | None, options: Mapping[str, Any], adapter: str) -> str:
    """The command line that runs a model with the adapter that was trained on it, as it was loaded."""
    from polyquant.loading.options import LoadOptions
    from polyquant.loading.settle import flag_words

    usual = {field.name: field.default for field in msgspec.structs.fields(LoadOptions)}
    chosen = {
        name: value
        for name, value in options.items()
        if value not in (None, "", [], ()) and not (name in usual and value == usual[name])
    }
    named = {"backend": backend} if backend else {}
    words = flag_words({**named, **chosen, "adapter": adapter})
    return shlex.join(["polyquant", "run", model, *words, "Once upon a time"])


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
