"""Work in a process of its own, for libraries that may end the process they run in, or leave threads in it; and what
other processes have left of theirs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from time import sleep

import msgspec
import psutil

from polyquant.errors import BackendFailed
from polyquant.support.processes import SHOWN_LINES, import_path

BUILD_POLL_SECONDS = 0.5


def run_in_process(
    module: str, job: Mapping[str, object], *, shown: bool = False, environment: Mapping[str, str] | None = None
) -> None:
    """`python -m module` in a fresh process with this one's import path; it reads `job` as JSON on its standard input.

    It works in an empty folder that is then deleted, where libraries may leave what they like: paths in `job` must be
    absolute.
    shown: let it print; otherwise what it prints is kept for the error. environment: variables set for it.
    Raises BackendFailed, with the last lines it printed, where it does not end with code 0.
    """
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        result = subprocess.run(
            [sys.executable, "-m", module],
            input=msgspec.json.encode(job),
            stdout=None if shown else subprocess.PIPE,
            stderr=None if shown else subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": import_path(), **(environment or {})},
            cwd=folder,
            check=False,
        )
    if result.returncode:
        said = (result.stdout or b"").decode(errors="replace").replace("\r", "\n").splitlines()
        last = "\n  ".join(line.rstrip() for line in said[-SHOWN_LINES:]) or "see what it printed above"
        raise BackendFailed(f"{module} ended with code {result.returncode}:\n  {last}")


def wait_for_build(folder: Path) -> list[str]:
    """Wait while another process compiles in `folder`; a note where that one is gone and has left its lock.

    folder: where torch.utils.cpp_extension compiles. torch itself waits for ever for the lock of a process that was
    killed. Whoever holds it has the file open, as far as it runs on this machine.
    """
    lock = folder / "lock"
    while lock.exists():
        if not _is_open(lock):
            lock.unlink(missing_ok=True)
            return [f"{lock} was left by a process that is gone, and was removed"]
        sleep(BUILD_POLL_SECONDS)
    return []


def _is_open(path: Path) -> bool:
    """Whether a process has a file open; of another user's file, whether one of theirs that cannot be looked into."""
    place = str(path.resolve())
    for process in psutil.process_iter():
        try:
            if any(file.path == place for file in process.open_files()):
                return True
        except psutil.AccessDenied:
            with suppress(psutil.Error, OSError, AttributeError):  # Windows has no such numbers
                if process.uids().effective == path.stat().st_uid != os.geteuid():
                    return True
        except psutil.Error:  # it has ended meanwhile
            continue
    return False
