"""Finished cells on disk: one file each, named by a hash of all that determines the result, with a checksum."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from polyquant.comparison.candidates import Candidate
from polyquant.comparison.records import Job, Result
from polyquant.support.cache import cache_folder
from polyquant.support.files import make_folder, write_atomically
from polyquant.support.machine import Machine
from polyquant.types import UNREADABLE, Record


class _File(Record, frozen=True):
    checksum: str  # SHA-256 of `result` as it stands
    result: msgspec.Raw


class Kept(NamedTuple):
    """What a cell's file gave."""

    result: Result | None
    note: str = ""  # why there is none, where there is a file


def cell_key(candidate: Candidate, job: Job, content: Mapping[str, str], machine: Machine) -> str:
    """Hash of what determines a cell's figures: models, options, text and preset, versions, machine; not its parts.

    content: hashes of the model and, where the candidate has one of its own, of that.
    """
    software = (sorted(machine.versions.items()), machine.python, os.environ.get("OMP_NUM_THREADS", ""))
    hardware = (machine.processor, machine.cores, machine.accelerators)
    asked = msgspec.json.encode({"options": candidate.options, "content": content}, order="deterministic")
    measured = (candidate.backend, job.device, job.reference_key, job.speed_limit_seconds)
    return hashlib.sha256(repr((asked, measured, software, hardware)).encode()).hexdigest()[:24]


def comparisons_folder() -> Path:
    """Where comparisons are kept that were not told another folder: one for each model."""
    return cache_folder() / "comparisons"


def cell_path(folder: Path, key: str) -> Path:
    """The file of a cell in a comparison's folder."""
    return folder / "cells" / f"{key}.json"


def read_cell(path: Path) -> Kept:
    """The result in a cell file; none, with the reason, where it is damaged or was changed by hand."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Kept(None)
    try:
        file = msgspec.json.decode(content, type=_File)
        if hashlib.sha256(file.result).hexdigest() != file.checksum:
            return Kept(None, f"{path.name} was changed since it was written, and is measured again")
        return Kept(msgspec.json.decode(file.result, type=Result))
    except UNREADABLE as error:
        return Kept(None, f"{path.name} is damaged ({error}), and is measured again")


def write_cell(path: Path, result: Result) -> None:
    """Raises SaveError where the disk does not take it."""
    text = msgspec.json.encode(result)
    file = _File(checksum=hashlib.sha256(text).hexdigest(), result=msgspec.Raw(text))
    make_folder(path.parent)
    write_atomically(path, msgspec.json.encode(file).decode())


def joined(before: Result | None, new: Result) -> Result:
    """`new` with the parts that were measured before."""
    if before is None:
        return new
    kept = {part for part in before.parts if part not in new.parts}
    fields = {"quality": ("quality", "layers"), "speed": ("speed", "other_work_share"), "tasks": ("scores",),
              "behaviour": ("behaviour",)}  # fmt: skip
    carried = {field: getattr(before, field) for part in kept for field in fields[part]}
    return msgspec.structs.replace(
        new,
        parts=tuple(part for part in fields if part in kept or part in new.parts),
        seconds=before.seconds + new.seconds,
        own_seconds=before.own_seconds + new.own_seconds,
        import_seconds=before.import_seconds + new.import_seconds,
        quantize_seconds=before.quantize_seconds if new.quantize_seconds is None else new.quantize_seconds,
        **carried,
    )
