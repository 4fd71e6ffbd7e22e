"""Python processes of their own, for what must not depend on what this process has imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from polyquant.testing import warm
from polyquant.testing.check import CheckFailed

LIMIT_SECONDS = 600


def run_python(code: str, *arguments: str, imported: bool = False) -> Any:
    """The JSON in the last line that `code` prints, run with this process's import path. Raises CheckFailed.

    imported: torch and transformers may have been imported when it starts, which spares their time.
    """
    environment = {**warm.ENVIRONMENT, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = ["-c", code, *arguments]
    if imported:
        result = warm.run(command, seconds=LIMIT_SECONDS, environment=environment)
    else:
        fresh = [sys.executable, "-u", *command]  # with an option it is so where warm.interpreter() stands for it
        result = subprocess.run(
            fresh, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False, env=environment
        )
    lines = result.stdout.splitlines()
    if result.returncode or not lines:
        raise CheckFailed(f"a fresh process ended with code {result.returncode}: {result.stderr.strip()[-1500:]}")
    return json.loads(lines[-1])
