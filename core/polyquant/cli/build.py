"""The command line: which commands there are, and those of them that are wanted as typer has them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Annotated, Any

import typer

import polyquant
from polyquant.cli.arguments import add_group
from polyquant.cli.elsewhere import Commands
from polyquant.cli.output import say

COMMANDS: Mapping[str, str] = {
    **dict.fromkeys(("backends", "doctor"), "listing"),
    "report": "reporting",
    "convert": "converting",
    **dict.fromkeys(("new-backend", "check-backend", "write-card"), "authoring"),
    **dict.fromkeys(("recommend", "plan"), "planning"),
    **dict.fromkeys(("load", "verify", "run"), "commands"),
    "chat": "chatting",
    "quantize": "commands",
    **dict.fromkeys(("finetune", "merge"), "training"),
    "serve": "serving",
    "search": "searching",
    "compare": "comparing",
    "gate": "gating",
}
"""Command -> the module beside this file whose function it is, in the order of the help."""
RECORDS: Mapping[str, tuple[str, str, str, str]] = {
    "finetune": ("training", "finetuning.options", "TrainingOptions", "Training"),
    "serve": ("options", "serving.options", "ServeOptions", "How to serve"),
    "search": ("how", "searching.options", "SearchOptions", "How to search"),
    "compare": ("options", "comparison.options", "CompareOptions", "How to compare"),
    "gate": ("limits", "comparison.gate", "Limits", "Limits"),
}
"""Command -> the parameter that is spread into options, the module and name of their record, and their heading."""
GROUPS: Mapping[str, str] = {"env": "environments", "cache": "caching"}
"""Word -> the module of the commands under it."""


def _version(wanted: bool) -> None:
    if wanted:
        say(polyquant.__version__)
        raise typer.Exit


def build(backend: str | None, command: str | None = None) -> typer.Typer:
    """The command line, with the options of `backend` where one is named.

    command: the only one that may be run, with options; any other word: names and help of all, without options.
    """
    alone = command in COMMANDS or command in GROUPS
    plain = not alone and bool(command)  # importing rich takes longer than all else
    app = typer.Typer(
        cls=Commands,
        help="Quantize Hugging Face language models: choose a backend, load, verify, run.",
        epilog="Options of a backend: polyquant run --backend NAME --help",
        no_args_is_help=True,
        rich_markup_mode=None if plain else "rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name in COMMANDS:
        if command in (None, name):
            app.command(name)(_with_options(name, backend))
        elif not alone:
            app.command(name, short_help=_promise(_function(name)))(_without_options(_function(name)))
    for name, module in GROUPS.items():
        if command in (None, name) or not alone:
            group = import_module(f"polyquant.cli.{module}")
            add_group(app, name, group.HELP, *(group.COMMANDS if command in (None, name) else ()))
    return app


def _function(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(import_module(f"polyquant.cli.{COMMANDS[name]}"), name.replace("-", "_"))
    return function


def _promise(command: Callable[..., Any]) -> str:
    """The first paragraph of its help, which lists would cut short otherwise."""
    return (inspect.getdoc(command) or "").partition("\n\n")[0]


def _without_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`command` as a list of commands has it: with its name and its help alone."""

    def run() -> None: ...

    run.__doc__ = command.__doc__
    return run


def _with_options(name: str, backend: str | None) -> Callable[..., Any]:
    """A command with the options that are made of records: how to load, a backend's, and its own of `RECORDS`."""
    command = _function(name)
    loads = "loading" in inspect.signature(command).parameters
    if not loads and name not in RECORDS:
        return command
    from polyquant.cli.options import loads_models, spread

    if name in RECORDS:
        parameter, module, record, panel = RECORDS[name]
        command = spread(command, parameter, getattr(import_module(f"polyquant.{module}"), record), panel)
    if not loads:
        return command
    if name == "search":
        from polyquant.cli.searching import BACKEND

        return loads_models(command, backend or BACKEND, chooses=True)
    return loads_models(command, backend)


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
    ] = False,
) -> None: ...
