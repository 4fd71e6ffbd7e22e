"""What the commands write: all of it passes `visible`, so that no name can steer the terminal that shows it.

Names come from checkpoints, plugins and files, which anybody may have written. Imports nothing heavy.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from polyquant.errors import SaveError

STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but for line feed and tab, those that turn the direction of text, bytes that are no UTF-8."""


def visible(text: str) -> str:
    """`text` with the characters that steer a terminal written as JSON writes them."""
    return STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def say(*words: object, error: bool = False) -> None:
    """A line on standard output, or on standard error, where nobody is told that it takes none."""
    line = visible(" ".join(map(str, words)))
    if not error:
        with writing():
            print(line)
        return
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def print_json(value: object) -> None:
    """`value` as indented JSON on standard output."""
    import msgspec

    from polyquant.registry.cards import as_json

    say(msgspec.json.format(msgspec.json.encode(value, enc_hook=as_json), indent=2).decode())


def say_piece(piece: str) -> None:
    """A piece of generated text, at once; what is no terminal gets it as it is."""
    with writing():
        print(visible(piece) if sys.stdout.isatty() else piece, end="", flush=True)


def prepare() -> None:
    """No character that a stream's encoding lacks ends the program."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def finish(*, failed: bool) -> None:
    """Write what is left of standard output; failed: and nobody need be told where it cannot be written."""
    try:
        with writing():
            sys.stdout.flush()
    except SaveError:
        drop()
        if not failed:
            raise


def drop() -> None:
    """Let what standard output has not taken go nowhere: nothing is tried again at the end of the process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def writing() -> Iterator[None]:
    """Raises SaveError where standard output takes no more, such as on a full disk."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise SaveError(f"standard output cannot be written: {error}") from error
