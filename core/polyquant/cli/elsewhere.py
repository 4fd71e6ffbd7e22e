"""Words of other tools for what polyquant calls otherwise: who types one is told where it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typer.core import TyperGroup

PLACES: Mapping[str, str] = {
    "pull download": "polyquant load MODEL fetches what it needs; hf download MODEL fetches the files alone",
    "list ls": "polyquant backends lists backends; polyquant cache list what was kept",
    "rm": "polyquant cache rm deletes what was kept",
    "ps stop": "no model is kept running: polyquant run, chat and the like load it, and end with it",
    "bench benchmark": "polyquant compare MODEL -c BACKEND:PRESET measures speed, quality and memory",
    "eval evaluate": "polyquant compare MODEL -c BACKEND:PRESET measures quality; --tasks adds tasks",
    "train tune sft": "polyquant finetune MODEL --data FILE --out DIR",
    "generate": 'polyquant run MODEL "..."',
    "show info": "polyquant plan MODEL shows what it takes; polyquant verify MODEL what was loaded",
    "export": "polyquant convert CHECKPOINT --to FORMAT --out DIR re-labels; polyquant quantize MODEL --out DIR packs",
    "install": "polyquant doctor says what a backend lacks, with the command",
}
ELSEWHERE = {word: place for words, place in PLACES.items() for word in words.split()}
"""A command of another tool -> what does it here."""


class Commands(TyperGroup):
    """The commands; an unknown one is told with where it is, if another tool has a command of that name."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """See click's own."""
        if args and args[0] not in self.commands and (place := ELSEWHERE.get(args[0])):
            ctx.fail(f"No such command {args[0]!r}: {place}")
        return super().resolve_command(ctx, args)
