"""Processes that start with torch and transformers imported, which takes most of a small test's time otherwise.

One process imports them and forks for each program: what a program finds is what a fresh Python finds after these
imports. Where there is no fork, or where variables differ that libraries read while they are imported, a program gets a
Python of its own.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import NamedTuple

CODE, MODULE = "-c", "-m"
IMPORTED = ("accelerate", "torch", "transformers.modeling_utils", "transformers.models.llama.modeling_llama",
            "transformers.models.auto.modeling_auto")  # fmt: skip
READ_ON_IMPORT = ("ACCELERATE_", "CUDA_", "HF_", "HIP_", "HOME", "HUGGINGFACE", "LD_", "MALLOC_", "MKL_", "OMP_",
                  "OPENBLAS_", "PATH", "PYTHON", "PYTORCH_", "TOKENIZERS_", "TORCH", "TRANSFORMERS_", "TRITON_",
                  "XDG_")  # fmt: skip
"""Beginnings of the names of variables that libraries read while they are imported."""
OBEYED_LATER = ("PYTHONPATH", "PYTHONUNBUFFERED", "TORCHINDUCTOR_CACHE_DIR")  # begin like those; a fork obeys them too
OUT, ERR = "out", "err"  # files of what a program prints
ENVIRONMENT = dict(os.environ)  # as it was before any backend was loaded here


class Program(NamedTuple):
    """What a fork runs."""

    command: list[str]  # what follows `python`: -c CODE or -m MODULE, and arguments
    environment: dict[str, str]
    folder: str  # to work in
    printed: str  # the folder for what it prints


def run(
    command: Sequence[str], *, seconds: float, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`python COMMAND`, what it prints, and its exit code. Raises subprocess.TimeoutExpired.

    command: -c and code, or -m and a module, with arguments. environment: all of its variables; None: this process's.
    folder: where it works; None: where this process does.
    """
    variables = dict(os.environ if environment is None else environment)
    if not hasattr(os, "fork") or read_on_import(variables) != read_on_import(ENVIRONMENT):
        return subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=seconds, check=False, env=variables,
            cwd=folder,
        )  # fmt: skip
    with TemporaryDirectory() as printed:
        code = _warm().run(Program(list(command), variables, str(folder or Path.cwd()), printed), seconds)
        out, err = ((Path(printed) / name).read_text(errors="replace") for name in (OUT, ERR))
    return subprocess.CompletedProcess([sys.executable, *command], code, out, err)


def read_on_import(variables: Mapping[str, str]) -> dict[str, str]:
    """Those of `variables` for which a fork comes too late."""
    return {
        name: value for name, value in variables.items() if name.startswith(READ_ON_IMPORT) and name not in OBEYED_LATER
    }


class _Warm:
    """A process that imports and forks; it ends with this one."""

    def __init__(self) -> None:
        variables = {name: value for name, value in ENVIRONMENT.items() if name not in OBEYED_LATER}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables
        )

    def run(self, program: Program, seconds: float) -> int:
        """The exit code of a program."""
        assert self._process.stdin is not None  # both are pipes
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([*program, seconds]).encode() + b"\n")  # ASCII: also of what is no UTF-8
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            raise RuntimeError(f"the process that forks ended with code {self._process.returncode}")
        code: int | None = json.loads(answer)
        if code is None:
            raise subprocess.TimeoutExpired(program.command, seconds)
        return code

    def close(self) -> None:
        """End it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()


@cache
def _warm() -> _Warm:
    """The one that forks, started when it is first asked for."""
    one = _Warm()
    atexit.register(one.close)
    return one


def _serve() -> Program | None:
    """Forks for each program that comes in; gives it in the fork, and None once there are no more."""
    answers = os.dup(1)
    for line in sys.stdin.buffer:
        *program, seconds = json.loads(line)
        if not (child := os.fork()):
            os.close(answers)
            return Program(*program)
        os.write(answers, json.dumps(_exit_code(child, seconds)).encode() + b"\n")
    return None


def _exit_code(child: int, seconds: float) -> int | None:
    """As subprocess gives it; None where its time was up: it is then killed, with what it has started."""

    def late(number: int, frame: object) -> None:
        os.killpg(child, signal.SIGKILL)

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    return None if code == -signal.SIGKILL and not left else code


def _become(program: Program) -> None:
    """In a fork: the program's session, files, folder, variables and import path."""
    os.setsid()
    for number, name in ((1, OUT), (2, ERR)):
        file = os.open(Path(program.printed) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(program.folder)
    os.environ.clear()
    os.environ.update(program.environment)
    kind, what, *arguments = program.command
    paths = [path for path in program.environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = ["" if kind == CODE else program.folder, *paths]
    sys.argv[:] = ["-c" if kind == CODE else what, *arguments]
    sys.orig_argv[:] = [sys.executable, *program.command]


def _run(kind: str, what: str) -> None:
    """In a fork: what `python -c` or `python -m` runs."""
    if kind == MODULE:
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = module = ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), module.__dict__)  # noqa: S102


if __name__ == "__main__":
    del sys.path[0]  # the folder of this file
    for _name in IMPORTED:
        __import__(_name)
    if _program := _serve():
        _become(_program)
        _run(*_program.command[:2])
