"""Both ends of what `polyquant.testing.warm` starts: a process that imports and forks, and what asks it for a fork.

`python forking.py serve DESCRIPTOR` listens there; `python -IS forking.py ask SOCKET -m MODULE ...` stands in the place
of `python -m MODULE ...`. Nothing of polyquant is imported, and little else: what asks is to start in no time.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from types import ModuleType
from typing import Any, NoReturn

IMPORTED = ("accelerate", "torch", "transformers.modeling_utils", "transformers.models.llama.modeling_llama",
            "transformers.models.auto.modeling_auto")  # fmt: skip
READ_ON_IMPORT = ("ACCELERATE_", "CUDA_", "HF_", "HIP_", "HOME", "HUGGINGFACE", "LD_", "MALLOC_", "MKL_", "OMP_",
                  "OPENBLAS_", "PATH", "PYTHON", "PYTORCH_", "TOKENIZERS_", "TORCH", "TRANSFORMERS_", "TRITON_",
                  "XDG_")  # fmt: skip
"""Beginnings of the names of variables that libraries read while they are imported."""
OBEYED_LATER = ("PYTHONPATH", "PYTHONUNBUFFERED", "TORCHINDUCTOR_CACHE_DIR")  # begin like those; a fork obeys them too
CODE, MODULE = "-c", "-m"
LENGTH_BYTES, ANSWER_BYTES = 8, 4
LOST = 120  # the exit code of Python where what it printed could not be written
FRESH = 2**31 - 1  # the answer, in place of an exit code, where a Python of its own has to run the command
PASSED_ON = ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
Program = tuple[list[str], dict[str, str], str, str]
"""What follows `python`, its variables, the folder to work in, and what stands for sys.executable."""


def ask(place: str, command: list[str]) -> None:
    """Run `python COMMAND` in a fork of the process that listens at `place`, with this one's files, and end as it does.

    It gets the signals that this process gets, and is killed where this one ends.
    """
    answer = FRESH
    if command and (command[0] in (CODE, MODULE) or not command[0].startswith("-")):
        with socket.socket(socket.AF_UNIX) as asked:
            asked.connect(place)
            interpreter = os.path.join(os.path.dirname(place), "python")  # noqa: PTH118, PTH120 (pathlib takes a while)
            content = json.dumps([command, dict(os.environ), os.getcwd(), interpreter]).encode()  # noqa: PTH109
            socket.send_fds(asked, [len(content).to_bytes(LENGTH_BYTES, "big")], [0, 1, 2])
            asked.sendall(content)
            for name in PASSED_ON:
                signal.signal(getattr(signal, name), lambda number, frame: asked.send(bytes([number])))
            received = asked.recv(ANSWER_BYTES, socket.MSG_WAITALL)
        if len(received) < ANSWER_BYTES:
            sys.exit("the process that forks has ended")
        answer = int.from_bytes(received, "big", signed=True)
    if answer == FRESH:
        os.execv(sys.executable, [sys.executable, *command])  # noqa: S606
    if answer < 0:
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-answer, signal.SIG_DFL)
        os.kill(os.getpid(), -answer)
    os._exit(answer)


def read_on_import(variables: Mapping[str, str]) -> dict[str, str]:
    """Those of `variables` for which a fork comes too late."""
    return {
        name: value for name, value in variables.items() if name.startswith(READ_ON_IMPORT) and name not in OBEYED_LATER
    }


def serve(listening: socket.socket, parent: int, own: Mapping[str, str]) -> Program | None:
    """Forks for each program that is asked for; gives it in the fork, and None once `parent`, a pipe, is closed.

    own: variables that have been read on import here.
    """
    import selectors

    with selectors.DefaultSelector() as ready:
        ready.register(listening, selectors.EVENT_READ)
        ready.register(parent, selectors.EVENT_READ)
        while True:
            key = ready.select()[0][0]  # one at a time: the next may be of the same program
            if key.fileobj == parent:
                return None
            if key.data:
                _follow(ready, key)
                continue
            asking, _ = listening.accept()
            program, files = _asked(asking)
            if not program:
                asking.close()
            elif read_on_import(program[1]) != own:
                _answer(asking, FRESH)
            elif child := os.fork():
                ended = os.pidfd_open(child)
                for each in (asking, ended):
                    ready.register(each, selectors.EVENT_READ, (child, asking, ended))
            else:  # who listens and who asked is the parent's alone
                for key in ready.get_map().values():
                    if key.data:
                        _, other, ended = key.data
                        other.close()
                        with suppress(OSError):  # the second time
                            os.close(ended)
                listening.close()
                asking.close()
                _take(files)
                return program
            for file in files:
                os.close(file)


def _follow(ready: Any, key: Any) -> None:
    """A program that runs: it has ended, is to get signals, or is not waited for any more."""
    child, asking, ended = key.data
    if key.fileobj is asking:
        numbers = asking.recv(ANSWER_BYTES)
        for number in numbers:
            os.kill(child, number)
        if not numbers:
            ready.unregister(asking)
            os.kill(child, signal.SIGKILL)
            with suppress(ProcessLookupError):  # it leads no group yet
                os.killpg(child, signal.SIGKILL)
        return
    ready.unregister(ended)
    os.close(ended)
    with suppress(KeyError):  # it was not waited for any more
        ready.unregister(asking)
    _answer(asking, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _asked(asking: socket.socket) -> tuple[Program | None, list[int]]:
    """A program, or None where what asks has ended, and the files 0, 1 and 2 that it is to have."""
    head, files, _, _ = socket.recv_fds(asking, LENGTH_BYTES, 3)
    length = int.from_bytes(head, "big")
    content = asking.recv(length, socket.MSG_WAITALL) if length else b""
    if not content or len(content) < length:
        return None, files
    command, environment, folder, interpreter = json.loads(content)
    return (command, environment, folder, interpreter), files


def _answer(asking: socket.socket, answer: int) -> None:
    with asking, suppress(OSError):  # it has ended
        asking.sendall(answer.to_bytes(ANSWER_BYTES, "big", signed=True))


def _take(files: list[int]) -> None:
    """In a fork: a session of its own, and its files."""
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)


def become(program: Program) -> None:
    """In a fork: the program's folder, variables, arguments and import path."""
    from pathlib import Path

    command, environment, folder, interpreter = program
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    _renew_streams(write_through=bool(environment.get("PYTHONUNBUFFERED")))
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if command[0] == CODE:
        first, arguments = "", [CODE, *command[2:]]
    elif command[0] == MODULE:
        first, arguments = folder, command[1:]
    else:
        first, arguments = str(Path(folder, command[0]).parent), command
    sys.path[:0] = [first, *paths]
    sys.argv[:] = arguments
    sys.orig_argv[:] = [interpreter, *command]
    sys.executable = interpreter


def _renew_streams(*, write_through: bool) -> None:
    """In a fork: streams know whether their file is a terminal, or can seek, since they were made."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        before, mode, buffering = getattr(sys, name), "r" if number == 0 else "w", 1 if number == 2 else -1
        stream: Any = open(number, mode, buffering, before.encoding, before.errors, closefd=False)  # noqa: SIM115
        if number:
            stream.reconfigure(write_through=write_through)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def run(command: list[str]) -> NoReturn:
    """In a fork: what `python -c`, `python -m` or `python FILE` runs, and its end."""
    _end(_raised(command))


def _raised(command: list[str]) -> BaseException | None:
    import runpy
    from pathlib import Path

    try:
        if command[0] == MODULE:
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
            return None
        sys.modules["__main__"] = module = ModuleType("__main__")
        if command[0] == CODE:
            code, name = command[1], "<string>"
        else:
            name = module.__file__ = command[0]
            code = Path(name).read_text(encoding="utf-8")
        exec(compile(code, name, "exec"), module.__dict__)  # noqa: S102
    except BaseException as error:  # whatever it is, it ends the program as it would end a Python
        return error
    return None


def _end(error: BaseException | None) -> NoReturn:
    """As Python ends, but what was imported is not freed: that takes two seconds of a core.

    error: what the program raised.
    """
    import atexit
    import ctypes
    import gc
    import threading

    code: Any = 0
    if isinstance(error, SystemExit):
        code = error.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    elif error is not None:
        code = 1
        sys.excepthook(type(error), error, error.__traceback__ and error.__traceback__.tb_next)
    interrupted, error = isinstance(error, KeyboardInterrupt), None
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if (own := vars(sys.modules["__main__"])) is not globals():
        own.clear()  # files are closed, and finalizers run
    gc.collect()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = LOST
    ctypes.CDLL(None).fflush(None)
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        ask(sys.argv[2], sys.argv[3:])
    import gc

    del sys.path[0]  # the folder of this file
    _own = read_on_import(os.environ)  # some libraries change it
    for _name in IMPORTED:
        __import__(_name)
    gc.collect()
    gc.freeze()  # a fork looks for garbage in its own alone
    if _program := serve(socket.socket(fileno=int(sys.argv[2])), 0, _own):
        become(_program)
        run(_program[0])
