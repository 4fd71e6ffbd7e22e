"""Runs the steps that make an environment: python -m polyquant.isolated.installing STEPS.json. Ends with its parent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec

from polyquant.support.processes import end_with_parent, say
from polyquant.types import Record

TOLD = ("Collecting ", "Downloading ", "Building ", "Preparing ", "Installing ")  # lines of pip that say what it does


class Step(Record, frozen=True):
    """A command, and what it does."""

    what: str
    command: tuple[str, ...]


def main() -> None:
    """One step after the other; the exit code is that of the first that fails."""
    end_with_parent()
    surroundings = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    for step in msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=list[Step]):
        say(step.what)
        with subprocess.Popen(
            step.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", env=surroundings,
        ) as child:  # fmt: skip
            for line in child.stdout or ():
                print(line, end="", flush=True)
                if line.startswith(TOLD):
                    say(f"{step.what}: {line.strip()[:100]}")
        if child.returncode:
            sys.exit(child.returncode)


if __name__ == "__main__":
    main()
