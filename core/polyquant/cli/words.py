"""What errors advise, in a shell's words: the core names options as Python takes them, a shell takes flags."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import msgspec

from polyquant.cli.options import usable_card
from polyquant.comparison.gate import Limits
from polyquant.comparison.options import CompareOptions
from polyquant.finetuning.options import TrainingOptions
from polyquant.loading.options import LoadOptions
from polyquant.searching.options import SearchOptions

VALUE = r"""True|False|\.\.\.|'[^']*'|"[^"]*"|\((?:'[^']*',?\ ?)+\)|\d[\w.]*"""
ADVICE = re.compile(rf"""
    [\w.]+\((?:[^()]|\([^()]*\))*\)   # Python's calls stay
    |(?<![\w.:,@])               # and candidates
    ([a-z][a-z0-9_]*)=({VALUE})
    (\ \(--[^)]*\))?            # the flag
    (?!\w|,[a-z])
""", re.VERBOSE)  # fmt: skip
NOT_FLAGS = frozenset({"device_map"})
"""Options of a load that no command has."""


def in_shell(text: str, backend: str | None) -> str:
    """`text` with the options that it names as flags: `backend=...` as `--backend ...`, `force=True` as `--force`.

    backend: the one that the command named, whose options are known besides those of all commands. What is no option
    stays as it is.
    """
    known = option_names(backend)

    def flag(found: re.Match[str]) -> str:
        if found[3]:  # the message has both
            return found[3].strip(" ()")
        return _flag(found[1], found[2]) if found[1] in known else found[0]  # a call has none

    return ADVICE.sub(flag, text)


def option_names(backend: str | None) -> Collection[str]:
    """The options that commands have, and those of `backend`, which may be `backend:preset`."""
    records: list[type[msgspec.Struct]] = [LoadOptions, TrainingOptions, CompareOptions, SearchOptions, Limits]
    if (info := usable_card(backend)) is not None:
        records.append(info.options)
    names = {field for record in records for field in record.__struct_fields__}
    return (names | {"against", "backend", "revision", "memory", "bits", "scheme"}) - NOT_FLAGS


def _flag(name: str, value: str) -> str:
    written = name.replace("_", "-")
    if value in ("True", "False"):
        return f"--{'' if value == 'True' else 'no-'}{written}"
    plain: Any = re.findall(r"'([^']*)'", value) if value.startswith("(") else [value.strip("'\"")]
    return f"--{written} {','.join(plain)}"
