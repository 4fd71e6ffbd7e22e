"""Runs the commands that make an environment, and ends with its parent.

python -m polyquant.isolated.installing COMMANDS.json
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec

from polyquant.support.processes import ParentProgress, end_with_parent
from polyquant.support.progress import Step
from polyquant.types import Record

SHOWN = ("Collecting ", "Downloading ", "Building ", "Preparing ", "Installing ")  # lines of pip that say what it does


class Command(Record, frozen=True):
    """What a command does, and its words."""

    what: str
    words: tuple[str, ...]


def main() -> None:
    """One command after the other; the exit code is that of the first that fails."""
    end_with_parent()
    progress = ParentProgress()
    surroundings = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    for command in msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=list[Command]):
        progress.step(Step(what=command.what))
        with subprocess.Popen(
            command.words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", env=surroundings,
        ) as child:  # fmt: skip
            for line in child.stdout or ():
                print(line, end="", flush=True)
                if line.startswith(SHOWN):
                    progress.step(Step(what=f"{command.what}: {line.strip()[:100]}"))
        if child.returncode:
            sys.exit(child.returncode)


if __name__ == "__main__":
    main()
