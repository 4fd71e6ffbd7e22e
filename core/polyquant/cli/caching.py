"""The commands for quantized weights that are kept: list, rm, path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polyquant.cli.arguments import Json
from polyquant.cli.output import print_json, say
from polyquant.errors import ConfigError
from polyquant.support.cache import cache_folder
from polyquant.support.sizes import size

if TYPE_CHECKING:
    from polyquant.loading.entries import Kept


def _complete(incomplete: str) -> list[str]:
    from polyquant.loading import entries

    return [each.key for each in entries.kept() if each.key.startswith(incomplete)]


Keys = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY...", help="Beginnings of keys, as list shows them.", autocompletion=_complete,
                   show_default=False),
]  # fmt: skip


HELP = "Quantized weights that loads have kept, for the next load of the same."


def list_(json: Json = False) -> None:
    """List the quantized weights that are kept, the last used first, with what they take of POLYQUANT_CACHE_SIZE.

    Example: polyquant cache list
    """
    from polyquant.loading import entries

    rows, most = entries.kept(), entries.most_bytes()
    if json:
        print_json(rows)
        return
    for each in rows:
        own = each.entry
        say(f"{each.key[:12]}  {size(own.stored_bytes):>10}  used {each.used[:16]}  {own.model} with {_how(each)}")
    taken = sum(each.entry.stored_bytes for each in rows)
    say(f"{len(rows)} kept, {size(taken)} of {size(most)} ({entries.SIZE})")


def rm(
    keys: Keys = None,
    all_: Annotated[bool, typer.Option("--all", help="All that is kept.", show_default=False)] = False,
) -> None:
    """Delete quantized weights that are kept; models that are loaded keep theirs.

    Example: polyquant cache rm --all
    """
    from polyquant.loading import entries

    rows = entries.kept()
    if bool(keys) == all_:
        raise ConfigError("name what is to be deleted by its key (polyquant cache list), or --all")
    chosen = rows if all_ else [_named(key, rows) for key in keys or ()]
    for each in chosen:
        entries.remove(Path(each.folder))
        say(f"deleted {each.key[:12]}: {each.entry.model} with {_how(each)}")


def path() -> None:
    """Print the folder of everything that polyquant keeps: POLYQUANT_CACHE, else one in the user's cache.

    Example: polyquant cache path
    """
    say(str(cache_folder()))


def _named(key: str, rows: list[Kept]) -> Kept:
    found = [each for each in rows if each.key.startswith(key)]
    if len(found) != 1:
        there = ", ".join(each.key[:12] for each in rows) or "nothing"
        what = "nothing that is kept has" if not found else f"{len(found)} that are kept have"
        raise ConfigError(f"{what} a key that begins with {key!r}; there are {there}")
    return found[0]


def _how(each: Kept) -> str:
    shown = {name: each.entry.options[name] for name in ("bits", "quant_type", "type", "weights", "group_size")
             if each.entry.options.get(name) is not None}  # fmt: skip
    return ", ".join([each.entry.backend, *(f"{name}={value}" for name, value in shown.items())])


COMMANDS = (list_, rm, path)
