"""For griffe: the docstrings' own conventions in Markdown. Arguments become a list, `>>>` becomes a code block."""

from __future__ import annotations

import re
from typing import Any

import griffe

ARGUMENT = re.compile(r"^((?:\w+, )*\w+): ", re.ASCII)


class Conventions(griffe.Extension):
    """Rewrites each docstring when its object has been read."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        rewrite(func, {parameter.name for parameter in func.parameters})

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        rewrite(cls, set(cls.members))


def rewrite(thing: griffe.Object, names: set[str]) -> None:
    if thing.docstring is not None:
        thing.docstring.value = markdown(thing.docstring.value, names)


def markdown(text: str, names: set[str]) -> str:
    """`text` with one list item for each of `names` that it explains, and examples as code."""
    lines: list[str] = []
    state = "text"
    for line in text.splitlines():
        found = ARGUMENT.match(line)
        if line.startswith((">>> ", "... ")):
            if state != "code":
                lines += ["", "```pycon"]
            state = "code"
            lines.append(line)
            continue
        if state == "code":
            if line.strip():
                lines.append(line)
                continue
            lines.append("```")
            state = "text"
        if found and set(found[1].split(", ")) <= names:
            lines += [*([""] if state == "text" else []), f"- `{found[1]}`: {line[found.end() :]}"]
            state = "list"
        elif state == "list" and line.startswith(" "):
            lines.append(f"  {line.strip()}")
        elif state == "list":
            lines += ["", line]
            state = "text"
        else:
            lines.append(line)
    return "\n".join([*lines, *(["```"] if state == "code" else [])])
