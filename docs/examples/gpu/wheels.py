"""Wheels as files: what they need, and the same wheel with fewer files in it."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def name_and_version(wheel: Path) -> tuple[str, str]:
    """Of a wheel, from its file name: the canonical name, and the version."""
    name, version, *_ = wheel.name.split("-")
    return canonicalize_name(name), version


def runs_anywhere(wheel: Path) -> bool:
    """Whether it holds no compiled code: any Python 3 on any platform takes it."""
    return wheel.stem.endswith("-none-any")


def needs(wheel: Path) -> list[Requirement]:
    """Its Requires-Dist, markers and all."""
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in archive.namelist() if _in_dist_info(name, "METADATA")]
        stated = message_from_bytes(archive.read(path)).get_all("Requires-Dist") or []
    return [Requirement(text) for text in stated]


def thin(wheel: Path, keep: Callable[[str], bool]) -> list[str]:
    """Take the files out of `wheel` for which `keep(name)` is false, its RECORD renewed; returns their names.

    Raises ValueError where nothing is taken out: the wheel is then not the one that the rule was made for.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        dropped = [name for name in names if not keep(name)]
        if not dropped:
            raise ValueError(f"{wheel.name} holds nothing that is to be taken out; it has changed")
        kept = {name: archive.read(name) for name in names if keep(name)}
    (record,) = [name for name in kept if _in_dist_info(name, "RECORD")]
    del kept[record]
    partial = wheel.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in kept.items():
            archive.writestr(name, content)
        archive.writestr(record, _record(kept, record))
    partial.replace(wheel)
    return dropped


def _record(contents: dict[str, bytes], own_name: str) -> str:
    """The RECORD of these files: name, hash, size; its own line has neither of the last two."""
    lines = io.StringIO()
    rows = csv.writer(lines, lineterminator="\n")
    for name, content in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.writerow((name, f"sha256={digest}", len(content)))
    rows.writerow((own_name, "", ""))
    return lines.getvalue()


def _in_dist_info(name: str, file: str) -> bool:
    folder, _, rest = name.partition("/")
    return folder.endswith(".dist-info") and rest == file
