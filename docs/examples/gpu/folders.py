"""The folders of a run: one for its results, and one of its own for models, which no other uses at the same time."""

from __future__ import annotations

import fcntl
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO

OWN = "polyquant-gpu"  # folder in --work: what else lies there is not the run's to remove


class Workplace:
    """The folder of models. A run that finds it there, as one with --keep leaves it, uses it and leaves it too."""

    def __init__(self, given: Path) -> None:
        """Raises OSError where it cannot be made, or another run is in it."""
        self.path = own_folder(given)
        self.made = [folder for folder in (self.path, self.path.parent) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock: IO[str] = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however that is
        except BlockingIOError as error:
            self.close()
            raise OSError(f"another run works in {self.path}") from error

    def close(self) -> None:
        """Let another run in."""
        self._lock.close()

    def tidy(self) -> None:
        """Remove what was made for this run; the folder that it is in where it is empty then."""
        if self.path in self.made:
            shutil.rmtree(self.path, ignore_errors=True)
        if self.path.parent in self.made:
            with suppress(OSError):  # not empty: --out may be there
                self.path.parent.rmdir()


def own_folder(given: Path) -> Path:
    """The run's folder in --work."""
    return given.resolve() / OWN


def replace(path: Path, text: str) -> str:
    """Write the whole file, or leave the one that was there before, as on a full disk; why, empty where it is whole."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        say(f"{path.name} is as it was before: {error}")
        return str(error)
    return ""


def say(text: str) -> None:
    """Print a line, where anybody is still there to read it, and can: a terminal may have hung up."""
    with suppress(OSError, UnicodeError):
        print(text, flush=True)
