"""Holds what other people's code may do to the program: write to standard output, or never return."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, Thread, get_ident
from traceback import walk_stack
from typing import Any, TextIO, TypeVar

Answer = TypeVar("Answer")


class Late(Exception):
    """Something has not returned in time; `lines`: the files and lines it is at, outermost first."""

    def __init__(self, lines: list[tuple[str, int]]) -> None:
        super().__init__("it has not returned in time")
        self.lines = lines


class _Parted:
    """Standard output, of which some threads have another one."""

    def __init__(self, whole: Any) -> None:
        self.whole, self.of_thread, self.users = whole, dict[int, TextIO](), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of_thread.get(get_ident(), self.whole), name)


_parting = Lock()


@contextmanager
def output_to(other: TextIO) -> Iterator[None]:
    """Within the block, what this thread writes to standard output goes to `other`; other threads are left alone."""
    with _parting:
        parted = sys.stdout if isinstance(sys.stdout, _Parted) else _Parted(sys.stdout)
        sys.stdout = parted
        parted.users += 1
    before = parted.of_thread.get(get_ident())
    parted.of_thread[get_ident()] = other
    try:
        yield
    finally:
        del parted.of_thread[get_ident()]
        if before is not None:
            parted.of_thread[get_ident()] = before
        with _parting:
            parted.users -= 1
            if not parted.users and sys.stdout is parted:
                sys.stdout = parted.whole


def within(seconds: float, answer: Callable[[], Answer]) -> Answer:
    """What `answer` gives or raises, in a thread of its own. Raises Late after `seconds`; the thread is then left."""
    given: list[Answer] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            given.append(answer())
        except BaseException as error:  # the caller's, whatever it is
            raised.append(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not given:
        frame = sys._current_frames().get(thread.ident or 0)
        lines = [(at.f_code.co_filename, line) for at, line in walk_stack(frame)] if frame else []
        raise Late(lines[::-1])
    return given[0]
