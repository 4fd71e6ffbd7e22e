"""Environments of their own: which backend has which, where it lies, and whether it can be used. Imports nothing heavy.

A folder of the cache, NAME-HASH: the hash is that of what is installed there, so that other pins are another one. Only
a folder with its record, which is written last, is ever used.
"""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path

import msgspec

from polyquant.errors import EnvironmentProblem
from polyquant.isolated.sources import arguments_for
from polyquant.support.cache import cache_folder
from polyquant.support.libraries import each_library_problem
from polyquant.types import UNREADABLE, BackendInfo, Isolated, Problem, Record

RECORD = "polyquant-environment.json"
HASH_LETTERS = 12


class Made(Record, frozen=True):
    """What an environment's record says."""

    backend: str
    isolated: Isolated
    python: str
    created: str  # ISO 8601, UTC
    installed: tuple[str, ...]  # name==version of everything in it
    stored_bytes: int


class Environment(Record, frozen=True):
    """The environment that a backend needs, made or not."""

    backend: str
    isolated: Isolated
    installs: tuple[tuple[str, ...], ...]  # pip's arguments for the core and the plugin, from where they come from here
    folder: Path

    @property
    def name(self) -> str:
        """NAME-HASH."""
        return self.folder.name

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")

    @property
    def command(self) -> str:
        """What creates it."""
        return f"polyquant env create {self.backend}"

    def problem(self) -> Problem | None:
        """Why it cannot be used; None where it can."""
        made = read_record(self.folder)
        if made is None:
            left = " (one that was never finished is there)" if self.folder.exists() else ""
            what = f"{self.backend} runs in an environment of its own, which is not there{left}: {self.isolated.reason}"
            return Problem(what=what, fix=self.command, kind="missing")
        if not self.python.exists():
            what = f"the environment {self.name} has lost its interpreter: {self.python} leads nowhere"
            return Problem(what=what, fix=self.command, kind="missing")
        return None

    def require(self) -> None:
        """Raises EnvironmentProblem where it cannot be used."""
        if problem := self.problem():
            raise EnvironmentProblem(f"{problem.what}\n  fix: {problem.fix}")


def needs_own_environment(info: BackendInfo) -> bool:
    """Whether a backend needs an environment of its own here: it may, and its libraries are not in this one."""
    return info.isolated is not None and any(each_library_problem(info.libraries))


def card_in_this_process(info: BackendInfo) -> BackendInfo:
    """The card of a backend, for this process: what runs elsewhere is no torch module here."""
    if not needs_own_environment(info):
        return info
    here = msgspec.structs.replace(info.capabilities, runtime="a worker", trains=False, compiles=False)
    return msgspec.structs.replace(info, capabilities=here)


def environment_of(info: BackendInfo, distribution: str) -> Environment:
    """The environment of a backend that declares one; distribution: the one that provides it."""
    import hashlib

    isolated = info.isolated or Isolated(reason="asked for")
    installs = (arguments_for("polyquant"), arguments_for(distribution))
    place = (*sys.version_info[:2], sys.platform, platform.machine())
    content = msgspec.json.encode([isolated, installs, place], order="deterministic")
    name = f"{info.name}-{hashlib.sha256(content).hexdigest()[:HASH_LETTERS]}"
    return Environment(backend=info.name, isolated=isolated, installs=installs, folder=environments_folder() / name)


def environments_folder() -> Path:
    """Where they all lie."""
    return (cache_folder() / "environments").absolute()


def folders_of(backend: str) -> list[Path]:
    """Every environment of a backend, those of other pins and unfinished ones too."""
    found = sorted(environments_folder().glob(f"{backend}-*"))
    return [path for path in found if path.is_dir() and len(path.name) == len(backend) + 1 + HASH_LETTERS]


def read_record(folder: Path) -> Made | None:
    """The record of an environment; None where there is none that can be read: it is then not used."""
    try:
        return msgspec.json.decode((folder / RECORD).read_bytes(), type=Made)
    except (OSError, *UNREADABLE):
        return None


def remove(folder: Path) -> None:
    """Delete an environment; its record goes first, so that a kill leaves none that is used."""
    (folder / RECORD).unlink(missing_ok=True)
    shutil.rmtree(folder)
