"""Arguments that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(help="Hub name, local folder, .gguf file, or builtin:smollm2.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
