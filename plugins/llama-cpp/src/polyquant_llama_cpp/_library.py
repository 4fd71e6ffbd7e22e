"""What llama.cpp says while it works: kept for messages of ours instead of being printed.

Its log goes through one function pointer of the process. It is ours while a call of this package runs, and then what it
was; lines of other threads are passed on.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, local
from typing import Any

from llama_cpp import llama_cpp as lib

WARN, ERROR, CONTINUED = 3, 4, 5  # enum ggml_log_level


class Log:
    """Lines of one stretch of work, each with its level."""

    def __init__(self, heard: Callable[[str], None] | None = None) -> None:
        self.lines: list[tuple[int, str]] = []
        self.heard = heard

    def add(self, level: int, text: str) -> None:
        if level == CONTINUED and self.lines:
            level, before = self.lines.pop()
            text = before + text
        elif self.heard is not None:
            self.heard(text)
        self.lines.append((level, text))

    def text(self, level: int = 0) -> str:
        """Everything of at least this level."""
        return "".join(line for own, line in self.lines if own >= level)

    def reason(self) -> str:
        """What llama.cpp gives as the reason of a failure, in one line."""
        said = self.text(ERROR) or self.text(WARN)
        return " ".join(said.split()) or "llama.cpp gives no reason"


_heard, _lock, _depth = local(), Lock(), 0
_before: tuple[Any, ctypes.c_void_p] = (lib.llama_log_callback(), ctypes.c_void_p())


@lib.llama_log_callback
def _receive(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    log: Log | None = getattr(_heard, "log", None)
    if log is not None:
        log.add(level, text.decode(errors="replace"))
    elif _before[0]:
        _before[0](level, text, _before[1])


@contextmanager
def captured(heard: Callable[[str], None] | None = None) -> Iterator[Log]:
    """Within the block, what llama.cpp says on this thread goes to the log, and each new line to `heard`."""
    global _depth, _before  # noqa: PLW0603  there is one log function in the process
    with _lock:
        if _depth == 0:
            before, data = lib.llama_log_callback(), ctypes.c_void_p()
            lib.llama_log_get(ctypes.byref(before), ctypes.byref(data))
            _before = (before, data)
            lib.llama_log_set(_receive, ctypes.c_void_p())
        _depth += 1
    outer, _heard.log = getattr(_heard, "log", None), Log(heard)
    try:
        yield _heard.log
    finally:
        _heard.log = outer
        with _lock:
            _depth -= 1
            if _depth == 0:
                lib.llama_log_set(*_before)
