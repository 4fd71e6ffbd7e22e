"""Arguments that several commands take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import typer

Model = Annotated[
    str, typer.Argument(help="Hub name, local folder, .gguf file, or builtin:smollm2.", show_default=False)
]
MaxTokens = Annotated[int, typer.Option("--max-new-tokens", help="Tokens to generate at most.", min=1)]
Temperature = Annotated[float, typer.Option(help="0 for greedy decoding.", min=0.0)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


class Loading(NamedTuple):
    """What a command was told about loading: `polyquant.load`'s arguments."""

    backend: str | None
    revision: str | None
    options: dict[str, Any]


def sampling(temperature: float, **narrower: float) -> dict[str, Any]:
    """Parameters of `generate` for a temperature, 0 for greedy decoding. narrower: others of sampling, where it is."""
    return {"do_sample": True, "temperature": temperature, **narrower} if temperature else {"do_sample": False}


def complete_backend(incomplete: str) -> list[str]:
    """Names of installed backends."""
    from polyquant.registry.installed import registry

    return [name for name in registry().names() if name.startswith(incomplete)]


def add_group(app: typer.Typer, name: str, help: str, *commands: Callable[..., None]) -> None:
    """Add commands under a word of their own, by the functions' names; `list_` is called list."""
    group = typer.Typer(
        help=help, short_help=help, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]}
    )
    for command in commands:
        group.command(command.__name__.removesuffix("_"))(command)
    app.add_typer(group, name=name)
