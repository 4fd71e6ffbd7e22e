"""`polyquant compare`, with a row for each cell while it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

import polyquant
from polyquant.cli.arguments import Json
from polyquant.cli.output import say
from polyquant.cli.tables import read_table
from polyquant.errors import ConfigError, EnvironmentProblem

if TYPE_CHECKING:
    from polyquant.comparison.candidates import Candidate

NOT_OPTIONS = ("model", "candidates", "sweep", "out")  # in a file: everything else is an option


def complete_candidate(incomplete: str) -> list[str]:
    """Every preset of every installed backend."""
    from polyquant.comparison.candidates import presets_of

    names = [candidate.name for info in polyquant.backends() for candidate in presets_of(info)]
    return [name for name in ["dense:float32", "dense:bfloat16", *names] if name.startswith(incomplete)]


def compare(
    options: dict[str, Any],
    model: Annotated[str, typer.Argument(help="Hub name, local folder, .gguf file, or builtin:smollm2.")] = "",
    candidate: Annotated[
        list[str] | None,
        typer.Option("--candidate", "-c", autocompletion=complete_candidate,
                     help="backend (its first preset), backend:preset,option=value or backend@checkpoint; repeat it."),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option("--sweep", metavar="OPTION=VALUE,VALUE", help="Each candidate with each value; repeat it."),
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every preset of every backend that runs here.")] = False,
    file: Annotated[Path | None, typer.Option("--file", help="TOML file with model, candidates, options.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder that keeps finished cells and the report.")] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Compare quality, speed and memory of many candidates on a model, in one report.

    Finished cells are kept: the same command goes on after an interruption, and measures only what is new.

    Example: polyquant compare builtin:smollm2 -c bitsandbytes:nf4 -c "torchao:int8,compute_dtype=float32" -c gguf:Q4_0
    """
    from polyquant.cli.output import print_json
    from polyquant.cli.progress import showing_rows
    from polyquant.cli.reporting import show_comparison
    from polyquant.comparison.report.exports import as_plain

    written = _read(file) if file else {}
    model = model or str(written.get("model", ""))
    if not model:
        raise ConfigError("no model is named: give one, as in polyquant compare MODEL -c bitsandbytes:nf4")
    chosen = [*map(_candidate, written.get("candidates", ())), *(candidate or ())]
    settings = {**{name: value for name, value in written.items() if name not in NOT_OPTIONS}, **options}
    if all_:
        chosen += ["dense:float32", *runnable(str(settings.get("device", "auto")))]
    sweeps = {**written.get("sweep", {}), **dict(map(_sweep, sweep or ()))}
    folder = out or (Path(written["out"]) if "out" in written else None)
    with showing_rows(live=not json and sys.stderr.isatty()) as progress:
        comparison = polyquant.compare(model, chosen, sweep=sweeps, out=folder, progress=progress, **settings)
    report, lacking = None, ""
    try:
        report = comparison.report(Path(comparison.folder) / "report.html")
    except EnvironmentProblem as error:  # only the page needs more than is installed
        lacking = f"no report.html: {error}"
    print_json(as_plain(comparison)) if json else show_comparison(comparison, report)
    if lacking:
        say(lacking, error=True)
    if len(comparison.done) < len(comparison.rows):
        raise typer.Exit(1)


def runnable(device: str) -> list[str]:
    """The presets of every backend that the doctor lets run; asked in a process of its own, which imports them all."""
    from polyquant.comparison.candidates import presets_of
    from polyquant.registry.installed import registry

    command = [sys.executable, "-m", "polyquant", "doctor", "--device", device, "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        healthy = [each["backend"] for each in msgspec.json.decode(answer.stdout) if not each["problems"]]
    except msgspec.DecodeError as error:
        raise ConfigError(f"the doctor failed, so --all is not known: {answer.stderr.strip()[-500:]}") from error
    cards = [polyquant.backend(name).info for name in healthy]
    makes = [info for info in cards if info.capabilities.on_the_fly or registry().implements(info.name, "quantize")]
    return [candidate.name for info in makes for candidate in presets_of(info)]


class _Written(msgspec.Struct):
    """What is no option in a file."""

    model: str = ""
    candidates: list[str | dict[str, Any]] = []
    sweep: dict[str, list[str | int | float | bool]] = {}
    out: str = ""


def _read(file: Path) -> dict[str, Any]:
    from polyquant.comparison.options import CompareOptions
    from polyquant.options import convert, describe_options

    content = read_table(file, "toml")
    known = [*NOT_OPTIONS, *(option.name for option in describe_options(CompareOptions))]
    unknown = [name for name in content if name not in known]
    if unknown:
        raise ConfigError(f"{file} has {', '.join(unknown)}; there are {', '.join(known)}")
    try:
        msgspec.convert({name: content[name] for name in NOT_OPTIONS if name in content}, _Written)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{file}: {error}") from error
    own = {name: value for name, value in content.items() if name not in NOT_OPTIONS}
    for name, value in msgspec.structs.asdict(convert(CompareOptions, own, strict=False)).items():
        if name in own:
            content[name] = value
    return content


def _sweep(text: str) -> tuple[str, list[str]]:
    """An option and its values, as in group_size=32,64."""
    option, _, values = text.partition("=")
    found = [value.strip() for value in values.split(",") if value.strip()]
    if not (option.strip() and found):
        raise ConfigError(f"--sweep is written as group_size=32,64,128, got {text!r}")
    return option.strip().replace("-", "_"), found


def _candidate(entry: str | dict[str, Any]) -> str | Candidate:
    """A candidate of a file: text, or a table with backend, preset, model, name and options."""
    if isinstance(entry, str):
        return entry
    entry = dict(entry)
    backend, preset = str(entry.pop("backend", "")), str(entry.pop("preset", ""))
    model, name = str(entry.pop("model", "")), str(entry.pop("name", ""))
    if not backend:
        raise ConfigError(f"a candidate in the file names no backend: {entry}")
    from polyquant.comparison.candidates import of_backend
    from polyquant.registry.installed import registry

    return of_backend(registry().info(backend), preset, entry, model=model, name=name)
