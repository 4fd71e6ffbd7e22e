"""The commands for backend authors: a package to start from, and whether a backend keeps its promises."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from polyquant import api


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(new_backend)


def new_backend(
    name: Annotated[str, typer.Argument(help="Such as acme; the package is polyquant-acme.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder to write: polyquant-NAME.", show_default=False)] = None,
) -> None:
    """Write a complete backend package to start from. It works as it is; what is yours is marked 'Replace:'.

    Example: polyquant new-backend acme
    """
    from polyquant.authoring import new

    new.check_name(name, api.registry().names())
    folder = out or Path(f"polyquant-{name}")
    files = new.new_backend(name, folder)
    print(f"wrote {folder}: {len(files)} files; what is yours is marked 'Replace:'. Next:")
    shown = folder if folder.is_absolute() else f"./{folder.as_posix()}"  # pip would look up a bare name
    print(f"  pip install -e {shlex.quote(str(shown))}\n  polyquant check-backend {name}")
