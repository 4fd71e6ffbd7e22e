"""Child processes, with this one's interpreter and import path or another's, which end when it ends and leave a log."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, RLock, Thread
from time import monotonic, sleep
from typing import Any, NamedTuple

import msgspec

from polyquant.errors import PolyquantError
from polyquant.support.progress import Progress, Step

SHOWN_LINES = 12  # of what a failed process said last
STEP = "[step] "  # begins the lines in which a child reports a step, which follows as JSON
POLL_SECONDS = 0.2
WAITS_WITHOUT_REAPING = hasattr(os, "waitid")  # Windows keeps ids by handle; macOS has it from Python 3.13 on
CHILD = "POLYQUANT_CHILD"  # environment variable that tells a child of `run_logged` that it is one


class Stopped(Exception):
    """The work was stopped before it was finished."""


class Ended(NamedTuple):
    """How a child process ended."""

    code: int | None  # None: its time was up
    said: str  # its last lines
    seconds: float


class Child(subprocess.Popen[bytes]):
    """A child process that leads a session of its own, and what it starts: they end with it.

    Nothing is signalled by an id that may be another process's by then: what it has started is killed after it has
    ended and before it is reaped, for so long the system keeps the id.
    """

    def __init__(self, command: Sequence[str | Path], **more: Any) -> None:
        self._reaping = RLock()  # a finalizer may come in the middle
        super().__init__(command, start_new_session=True, **more)

    def kill(self) -> None:
        """Kill it and what it has started, where it still runs."""
        with self._reaping:
            if self.returncode is None:
                self._kill_group()

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        with self._reaping:
            if self.returncode is None and self._has_ended():
                self._kill_group()
                super().wait()
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        until, pause = monotonic() + (timeout or 0.0), 0.0005
        while (code := self.poll()) is None:
            if timeout is None and WAITS_WITHOUT_REAPING:
                with suppress(ChildProcessError):  # reaped by another thread
                    os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
                continue
            if timeout is not None and monotonic() > until:
                raise subprocess.TimeoutExpired(self.args, timeout)
            sleep(pause := min(2 * pause, 0.05))
        return code

    def _has_ended(self) -> bool:
        if WAITS_WITHOUT_REAPING:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
        return super().poll() is not None

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # all of them have ended
            os.killpg(self.pid, signal.SIGKILL) if hasattr(os, "killpg") else super().kill()


def import_path() -> str:
    """This process's import path, as PYTHONPATH for another one."""
    return os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path if entry)


def run_logged(
    module: str, arguments: Iterable[str], log: Path, *, limit_seconds: float, progress: Progress,
    stop: Event | None = None, environment: Mapping[str, str] | None = None, interpreter: Path | None = None,
) -> Ended:  # fmt: skip
    """`python -m module arguments`, what it prints in `log`; it should call `end_with_parent` first.

    progress: sees each step that the child reports through `ParentProgress`, in order. environment: variables set for
    the child. interpreter: of another environment, with the import path it has; None: this one's, with this one's.
    After `limit_seconds`, where `stop` is set, and where this process is interrupted, the child is killed with all
    that it has started. Raises Stopped for `stop`.
    """
    started, passed_on = monotonic(), 0
    own_path = {"PYTHONPATH": import_path()} if interpreter is None else {"PYTHONPATH": "", "PYTHONNOUSERSITE": "1"}
    command = [sys.executable] if interpreter is None else [str(interpreter), "-P"]
    with log.open("wb") as file:
        child = Child(
            [*command, "-m", module, *arguments],
            stdin=subprocess.PIPE,  # stays open for as long as this process lives
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **own_path, "PYTHONUNBUFFERED": "1", CHILD: "1", **(environment or {})},
        )
        try:
            while True:
                try:
                    child.wait(POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    passed_on = _pass_steps_on(log, passed_on, progress)
                    if stop is not None and stop.is_set():
                        raise Stopped from None
                    if monotonic() - started > limit_seconds:
                        break
            _pass_steps_on(log, passed_on, progress)
        finally:
            in_time = child.poll() is not None
            child.kill()
            child.wait()
            if child.stdin is not None:
                child.stdin.close()
    return Ended(child.returncode if in_time else None, last_lines(log), monotonic() - started)


def end_with_parent() -> None:
    """In a child of `run_logged`: ends this process, and what it has started, as soon as its parent is gone.

    Does nothing in a process that was started in another way, such as from a shell.
    """
    if not os.environ.pop(CHILD, ""):
        return

    def watch() -> None:
        while os.read(0, 1):  # the descriptor: a buffered reader's lock would be held when the interpreter ends
            pass
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def run_as_child(main: Callable[[], None]) -> None:
    """`main` in a child of `run_logged`: where it raises an error of polyquant's, that is the last thing it says."""
    end_with_parent()
    try:
        main()
    except PolyquantError as problem:
        print(problem)
        sys.exit(problem.exit_code)


class ParentProgress(Progress):
    """In a child of `run_logged`: its steps are seen by the progress that its parent gave."""

    def step(self, step: Step) -> None:
        print(f"{STEP}{msgspec.json.encode(step).decode()}", flush=True)


def explain(code: int | None, limit_seconds: float) -> str:
    """What an exit code means, in words."""
    if code is None:
        return f"it took longer than {limit_seconds:.0f} s and was stopped"
    if code >= 0:
        return f"it ended with code {code}"
    name = signal.Signals(-code).name if -code in signal.valid_signals() else "unknown"
    guess = ", most likely for lack of memory" if name == "SIGKILL" else ""
    return f"it was killed by signal {-code} ({name}){guess}"


def account(ended: Ended, limit_seconds: float) -> str:
    """Why a child failed: in a first line how it ended, and its last word where it chose to; then what it said last."""
    last = ended.said.rpartition("\n")[2] if ended.code is not None and ended.code > 0 else ""
    return f"{explain(ended.code, limit_seconds)}{f': {last}' if last else ''}; it said last:\n{ended.said}"


def last_lines(log: Path) -> str:
    """What a log ends with, without the steps."""
    lines = log.read_bytes()[-20000:].decode(errors="replace").replace("\r", "\n").splitlines()
    said = [line.rstrip() for line in lines if line.strip() and not line.startswith(STEP)]
    return "\n".join(said[-SHOWN_LINES:])


def _pass_steps_on(log: Path, start: int, progress: Progress) -> int:
    """Give `progress` the steps in whole lines after `start`, a byte of the log; returns where the next line begins."""
    with log.open("rb") as file:
        file.seek(start)
        written = file.read()
    whole = written[: written.rfind(b"\n") + 1]
    for line in whole.decode(errors="replace").splitlines():
        if line.startswith(STEP):
            with suppress(msgspec.DecodeError):  # a library's own line that begins alike
                progress.step(msgspec.json.decode(line.removeprefix(STEP), type=Step))
    return start + len(whole)
