"""Which folders a later output may replace: empty ones, and those that polyquant wrote and nobody added to."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path

import msgspec

from polyquant.errors import SaveError
from polyquant.support.libraries import installed_version
from polyquant.support.paths import require_utf8
from polyquant.types import UNREADABLE, Record

MARK = ".polyquant-output"  # the file that tells an output of ours, and what was written with it
ADAPTER = ("polyquant.json", "adapter_*", "README.md", "steps.csv", "loss.svg", "runs")
REFERENCE = ("reference.json", "window-*.safetensors")
CALIBRATED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
"""What releases that left no mark wrote, by name, where only they can have."""


class Mark(Record, frozen=True):
    """What `MARK` says."""

    written_by: str
    files: tuple[str, ...]  # and folders, by name


def require_free(out: Path, *, overwrite: bool, keeps: Iterable[Path] = ()) -> None:
    """Raises SaveError where `out` is there and must not be replaced.

    With `overwrite`, an empty folder or an earlier output of polyquant is, to which nothing was added, unless it is or
    holds the working directory or one of `keeps`.
    """
    require_utf8(out)
    if not out.exists():
        return
    if not overwrite:
        raise SaveError(f"{out} exists; choose another folder, or replace it with overwrite=True (--overwrite)")
    place = resolved(out)
    for path in keeps:
        if place in ((inside := resolved(path)), *inside.parents) and path.exists():
            raise SaveError(f"{out} is not replaced: {path} is read from there; choose another folder")
    with suppress(FileNotFoundError):  # of a working directory that was deleted
        if place in (Path.cwd(), *Path.cwd().parents):
            raise SaveError(f"{out} is not replaced: the working directory is in it; choose another folder")
    if foreign := _foreign(place):
        raise SaveError(
            f"{out} is not replaced: {foreign}; overwrite=True (--overwrite) replaces an empty folder or an earlier "
            "output of polyquant. Choose another folder, or delete this one if nothing in it is needed"
        )


def resolved(path: Path) -> Path:
    """Where `path` leads. Raises SaveError where it leads nowhere."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise SaveError(f"{path} leads nowhere: {error}") from error


def _foreign(folder: Path) -> str:
    """Why a folder is no output of ours, or not only; empty where it is one, or has nothing in it."""
    if not folder.is_dir():
        return "it is no folder"
    try:
        there = {path.name for path in folder.iterdir()}
    except OSError as error:
        return f"it cannot be read ({error})"
    if not there:
        return ""
    written = _written(folder)
    if not written:
        return f"what is in it was not written by polyquant ({_some(there)})"
    added = [name for name in there if not any(fnmatchcase(name, pattern) for pattern in written)]
    return f"it holds what was not written by polyquant ({_some(added)})" if added else ""


def _written(folder: Path) -> tuple[str, ...]:
    """Patterns of the names that polyquant wrote in a folder; none where nothing tells that it is an output of ours."""
    try:
        return (MARK, *map(escape, msgspec.json.decode((folder / MARK).read_bytes(), type=Mark).files))
    except (OSError, *UNREADABLE):
        pass
    for names in (ADAPTER, REFERENCE):
        if (folder / names[0]).is_file():
            return names
    try:
        config = msgspec.json.decode((folder / "config.json").read_bytes(), type=dict[str, object])
    except (OSError, *UNREADABLE):
        return ()
    stored = config.get("quantization_config")
    return CALIBRATED if isinstance(stored, dict) and "skip_modules" in stored else ()


def _some(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def mark(folder: Path) -> None:
    """Let a later output replace this one."""
    files = tuple(sorted(path.name for path in folder.iterdir()))
    written = Mark(written_by=f"polyquant {installed_version('polyquant')}", files=files)
    (folder / MARK).write_text(written.to_json(), encoding="utf-8")
