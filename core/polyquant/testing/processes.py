"""Python processes of their own, for what must not depend on what this process has imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from polyquant.testing.check import CheckFailed

LIMIT_SECONDS = 600
ENVIRONMENT = dict(os.environ)  # as it was before any backend was loaded here


def run_python(code: str, *arguments: str) -> Any:
    """The JSON in the last line that `code` prints, run with this process's import path. Raises CheckFailed."""
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False, env=environment
    )
    lines = result.stdout.splitlines()
    if result.returncode or not lines:
        raise CheckFailed(f"a fresh process ended with code {result.returncode}: {result.stderr.strip()[-1500:]}")
    return json.loads(lines[-1])
