"""A process in another environment that answers calls, seen from here. Its end is an error with its last words."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Generator, Mapping
from threading import Lock, RLock, Thread, Timer
from typing import IO, Any

import msgspec

from polyquant import errors
from polyquant.errors import BackendFailed, ConfigError, EnvironmentProblem, PolyquantError
from polyquant.isolated import protocol
from polyquant.isolated.environments import Environment
from polyquant.support.libraries import installed_version
from polyquant.support.processes import SHOWN_LINES, Child, explain
from polyquant.types import HookRecord

START_SECONDS = 180  # until a worker has said its first word; it has imported no library by then
END_SECONDS = 10
UNSET = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "POLYQUANT_TRACE")  # hook calls are shown here


class InWorker(Exception):
    """The traceback of an error in a worker: the cause of the error here."""


class Worker:
    """One worker, and one call at a time. It ends when this object or this process does."""

    def __init__(self, environment: Environment, *, shown: bool = False, unfinished: bool = False) -> None:
        """Start it. shown: what it prints appears on standard error too. unfinished: the environment has no record yet.

        Raises EnvironmentProblem where the environment is not there, is broken, or has another polyquant.
        """
        from polyquant.packed_weights import kernels  # which a list of backends does without

        if not unfinished:
            environment.require()
        self.environment, self.shown = environment, shown
        self._said: deque[bytes] = deque(maxlen=400)
        self._lock, self._sending, self._forgotten = RLock(), Lock(), list[int]()
        self.records: list[HookRecord] = []  # of the hooks that the last call had called there
        self._stream: _Pieces | None = None
        kept = {name: value for name, value in os.environ.items() if name not in UNSET} | kernels.lent()
        try:
            self._process = Child(
                [environment.python, "-P", "-m", "polyquant.loading.in_worker", environment.backend],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env={**kept, **environment.isolated.variables, "PYTHONNOUSERSITE": "1", "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        except OSError as error:
            raise EnvironmentProblem(
                f"the interpreter of {environment.name} does not start: {error}\n  fix: {environment.command} --again"
            ) from error
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        self._answers, self._pipe = self._process.stdout, self._process.stdin.fileno()
        self._finalizer = weakref.finalize(self, _end, self._process)
        self._pump = Thread(target=_pump, args=(self._process.stderr, self._said, shown), daemon=True)
        self._pump.start()
        Thread(target=self._process.wait, daemon=True).start()  # what it has started may hold its pipes open
        self._greet()

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    def call(self, what: str, **arguments: Any) -> Any:
        """What the worker answers, as JSON has it. Raises what it raised, or BackendFailed where it ended."""
        return self._exchange(what, arguments)[0].get("result")

    def tensor(self, what: str, **arguments: Any) -> Any:
        """The tensor that the worker answers with."""
        return self._exchange(what, arguments)[1]

    def stream(self, what: str, **arguments: Any) -> Generator[Any, None, None]:
        """Answers as they come. Another call meanwhile waits for the rest of them, which is kept for this iterator."""
        with self._lock:
            self._finish_stream()
            self._send(what, arguments)
            self._stream = pieces = _Pieces()
        try:
            while True:
                with self._lock:
                    if not pieces.come and not pieces.ended:
                        self._next_piece(pieces)
                    piece = pieces.come.popleft() if pieces.come else None
                    if piece is None and pieces.error is not None:
                        raise pieces.error
                if piece is None:
                    return
                yield piece
        finally:
            if not pieces.ended and not self._sending.locked():  # where it is, the next call takes the rest of these
                self._send_line({"call": "stop"})

    def forget(self, session: int) -> None:
        """Let the worker drop a session, with its next call: this is called while garbage is collected."""
        self._forgotten.append(session)

    def close(self) -> None:
        """End it."""
        self._finalizer()

    def _greet(self) -> None:
        environment, ours = self.environment, installed_version("polyquant")
        timer = Timer(START_SECONDS, self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            hello = self._receive()[0]
        except BackendFailed as error:
            raise EnvironmentProblem(
                f"the environment {environment.name} is broken: {error}\n  fix: {environment.command} --again"
            ) from error
        finally:
            timer.cancel()
        theirs = (hello.get("protocol"), hello.get("polyquant"))
        if theirs != (protocol.VERSION, ours):
            self.close()
            raise EnvironmentProblem(
                f"the environment {environment.name} has polyquant {theirs[1]} (protocol {theirs[0]}), and this is "
                f"{ours} (protocol {protocol.VERSION})\n  fix: {environment.command} --again"
            )

    def _exchange(self, what: str, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        with self._lock:
            self._finish_stream()
            self.records = []
            self._send(what, arguments)
            answer, tensor = self._receive()
            self.records = msgspec.convert(answer.get("records", []), list[HookRecord])
            if "error" in answer:
                raise _error(self.environment.backend, answer["error"])
            return answer, tensor

    def _finish_stream(self) -> None:
        while self._stream is not None:
            self._next_piece(self._stream)

    def _next_piece(self, pieces: _Pieces) -> None:
        try:
            answer, _ = self._receive()
        except BackendFailed as error:
            self._stream, pieces.ended, pieces.error = None, True, error
            return
        if "piece" in answer:
            pieces.come.append(answer["piece"])
            return
        self._stream, pieces.ended = None, True
        if "error" in answer:
            pieces.error = _error(self.environment.backend, answer["error"])

    def _send(self, what: str, arguments: Mapping[str, Any]) -> None:
        forgotten, self._forgotten = self._forgotten, []
        self._send_line({"call": what, "arguments": arguments, "forgotten": forgotten})

    def _send_line(self, message: Mapping[str, Any]) -> None:
        try:
            with self._sending:
                protocol.send(self._pipe, message)
        except (TypeError, ValueError, protocol.ProtocolError) as error:
            raise ConfigError(f"{self.environment.backend} runs in a process of its own, and this cannot be sent to "
                              f"it: {error}") from error  # fmt: skip
        except OSError as error:
            raise self._ended() from error

    def _receive(self) -> tuple[dict[str, Any], Any]:
        try:
            return protocol.receive(self._answers)
        except (EOFError, OSError, protocol.ProtocolError) as error:
            raise self._ended(error if isinstance(error, protocol.ProtocolError) else None) from error
        except BaseException:
            self.close()  # interrupted in the middle of an answer: what follows would be read for another one
            raise

    def _ended(self, error: protocol.ProtocolError | None = None) -> BackendFailed:
        """The error for a worker that is no more, or that said what is none of the protocol and is ended for it."""
        try:
            self._process.wait(1 if error is not None else END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        wrong = f": {error}" if error is not None else ""
        self.close()
        self._pump.join(END_SECONDS)
        said = b"".join(self._said).decode(errors="replace").replace("\r", "\n").splitlines()
        last = "\n  ".join(line.rstrip() for line in said[-SHOWN_LINES:] if line.strip()) or "nothing"
        how = explain(self._process.wait(), 0)
        return BackendFailed(
            f"the worker of {self.environment.backend} is gone{wrong}: {how}; load the model again. "
            f"It said last:\n  {last}"
        )


class _Pieces:
    """What has come of a stream, and has not been taken yet."""

    def __init__(self) -> None:
        self.come: deque[Any] = deque()
        self.ended = False
        self.error: PolyquantError | None = None


def _error(backend: str, raised: Mapping[str, str]) -> PolyquantError:
    """An error of the worker as one here: polyquant's own under their names, with their traceback as the cause."""
    kind = getattr(errors, raised["kind"], None)
    if isinstance(kind, type) and issubclass(kind, PolyquantError):
        error = kind(raised["message"])
    else:
        error = BackendFailed(f"{backend}: {raised['kind']}: {raised['message']}")
    error.__cause__ = InWorker(raised["traceback"])
    return error


def _pump(pipe: IO[bytes], said: deque[bytes], shown: bool) -> None:
    """Keep the last of what a worker prints."""
    while chunk := os.read(pipe.fileno(), 2**14):
        said.append(chunk)
        if shown:
            sys.stderr.buffer.write(chunk)
            sys.stderr.flush()
    pipe.close()


def _end(process: Child) -> None:
    """Close a worker's input, which ends it, and see to it."""
    if process.stdin is not None:
        process.stdin.close()
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
