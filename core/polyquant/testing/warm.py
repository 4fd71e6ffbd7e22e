"""Processes that start with torch and transformers imported, which takes most of a small test's time otherwise.

One process imports them and forks for each program: what a program finds is what a fresh Python finds after these
imports, and it ends as a fresh one does, but that what was imported before is not freed. Where there is no fork, or
where variables differ that libraries read while they are imported, a program gets a Python of its own.
"""

from __future__ import annotations

import atexit
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from polyquant.testing import forking

ENVIRONMENT = dict(os.environ)  # as it was before any backend was loaded here

SOCKET = "socket"  # beside what stands for sys.executable: where the process that forks listens


def run(
    command: Sequence[str], *, seconds: float, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`python COMMAND`, what it prints, and its exit code. Raises subprocess.TimeoutExpired.

    command: -c and code, -m and a module, or a file, with arguments. environment: all of its variables; None: this
    process's. folder: where it works; None: where this process does.
    """
    return subprocess.run(
        [interpreter(), *command], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
        timeout=seconds, check=False, env=environment, cwd=folder,
    )  # fmt: skip


@cache
def interpreter() -> str:
    """What to start in place of sys.executable: a process that stands for the fork, gets its signals and ends with it.

    It is sys.executable in the program too, so that what that starts is forked as well; with an option before -c, -m or
    a file it is a Python of its own. Its own children are the program's neighbours: whoever looks for them by their
    parent takes sys.executable.
    """
    if Path(sys.executable).with_name(SOCKET).exists():  # this is a fork itself
        return sys.executable
    return _Warm().interpreter if hasattr(os, "pidfd_open") and hasattr(os, "fork") else sys.executable


@contextmanager
def as_executable() -> Iterator[None]:
    """Within it, what this process starts as sys.executable is such a fork."""
    before, sys.executable = sys.executable, interpreter()
    try:
        yield
    finally:
        sys.executable = before


class _Warm:
    """A process that imports and forks; it ends with this one."""

    def __init__(self) -> None:
        self._folder = TemporaryDirectory(prefix="warm-")
        place, file = (Path(self._folder.name) / name for name in (SOCKET, "python"))
        self.interpreter = str(file)
        words = [sys.executable, "-IS", forking.__file__, "ask", str(place)]
        file.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        file.chmod(0o755)
        variables = {name: value for name, value in ENVIRONMENT.items() if name not in forking.OBEYED_LATER}
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(place))
            listening.listen()
            self._process = subprocess.Popen(
                [sys.executable, forking.__file__, "serve", str(listening.fileno())], stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL, env=variables, pass_fds=[listening.fileno()], start_new_session=True,
            )  # fmt: skip
        atexit.register(self.close)

    def close(self) -> None:
        """End it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()
