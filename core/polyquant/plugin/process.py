"""Work in a process of its own, for libraries that may end the process they run in, or leave threads in it; and what
other processes have left of theirs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from time import sleep
from typing import Any

import msgspec
import psutil

from polyquant.errors import BackendFailed
from polyquant.support.processes import SHOWN_LINES, import_path

BUILD_POLL_SECONDS = 0.5
DONE = b"+"  # a job


class Job(msgspec.Struct, frozen=True):
    """What a process is to do."""

    folder: str  # to work in
    environment: dict[str, str]  # all of it: it may have changed since the process was started
    content: dict[str, Any]


class _Worker:
    """A process of a module, and what it has said."""

    def __init__(self, module: str, environment: Mapping[str, str], *, shown: bool) -> None:
        self._said = None if shown else TemporaryFile()  # noqa: SIM115 (`end` closes it)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "polyquant.plugin.jobs", module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, env=dict(environment),
        )  # fmt: skip

    def does(self, job: Job) -> bool:
        """Whether it has done a job; otherwise it has ended."""
        assert self._process.stdin is not None  # both are pipes
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it ended before it read the job: while it imported its library
            self._process.stdin.write(msgspec.json.encode(job) + b"\n")
            self._process.stdin.flush()
        return self._process.stdout.read(len(DONE)) == DONE

    def end(self, *, kill: bool = False) -> tuple[int, str]:
        """Its exit code and the last lines that it printed, once it has done its jobs, or at once."""
        if kill:
            self._process.kill()
        with suppress(BrokenPipeError):
            self._process.communicate()
        if self._said is None:
            return self._process.returncode, "see what it printed above"
        with self._said as said:
            said.seek(0)
            lines = said.read().decode(errors="replace").replace("\r", "\n").splitlines()
        return self._process.returncode, "\n  ".join(line.rstrip() for line in lines[-SHOWN_LINES:])


_kept: list[dict[str, tuple[object, _Worker]]] = []
"""An entry inside each `kept_processes`: of each module what its process was started with, and that process."""


def run_in_process(
    module: str, job: Mapping[str, object], *, shown: bool = False, environment: Mapping[str, str] | None = None
) -> None:
    """`main(job)` of a module in a fresh process with this one's import path; `job` goes there as JSON.

    It works in an empty folder that is then deleted, where libraries may leave what they like: paths in `job` must be
    absolute.
    shown: let it print, to standard error; otherwise what it prints is kept for the error. environment: variables set
    for it. Raises BackendFailed, with the last lines it printed, where it does not end with code 0.
    """
    variables = {**os.environ, "PYTHONPATH": import_path(), **(environment or {})}
    started_with = (shown, variables["PYTHONPATH"], dict(environment or {}))
    waiting, ended, done = _kept[-1] if _kept else {}, (0, ""), False
    before, worker = waiting.pop(module, (started_with, None))
    if worker is not None and before != started_with:
        worker.end()
        worker = None
    worker = worker or _Worker(module, variables, shown=shown)
    try:
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            done = worker.does(Job(folder, variables, dict(job)))
        if done and _kept:
            waiting[module] = (started_with, worker)
        else:
            ended = worker.end()
    except BaseException:
        worker.end(kill=True)
        raise
    code, said = ended
    if code or not done:
        raise BackendFailed(f"{module} ended with code {code}:\n  {said}")


@contextmanager
def kept_processes() -> Iterator[None]:
    """Until it ends, jobs of one module go to one process, one after the other: it imports its library once.

    That is for many jobs in a row: while it waits, such a process keeps its library in memory. Environment variables
    that have changed meanwhile change there too, for what is not read during the import. It ends with the first job
    that fails.
    """
    _kept.append({})
    try:
        yield
    finally:
        for _, worker in _kept.pop().values():
            worker.end()


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
