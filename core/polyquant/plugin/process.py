"""Work in a process of its own, for libraries that may end the process they run in, or leave threads in it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from tempfile import TemporaryDirectory

import msgspec

from polyquant.errors import BackendFailed
from polyquant.support.processes import SHOWN_LINES, import_path


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
