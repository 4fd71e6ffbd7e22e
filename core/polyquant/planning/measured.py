"""Results of comparisons on this machine, for a recommendation that rests on more than published figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from polyquant.comparison.candidates import Candidate
from polyquant.comparison.records import Result, Run
from polyquant.comparison.store import read_cell
from polyquant.support.machine import this_machine
from polyquant.types import UNREADABLE


class Measured(NamedTuple):
    """What was measured of one candidate."""

    backend: str
    options: Mapping[str, Any]  # as the candidate has them
    model: str
    result: Result
    path: Path

    @property
    def folder(self) -> str:
        """The name of the comparison's folder."""
        return (self.path.parent.parent if self.path.parent.name == "cells" else self.path.parent).name


def read_results(folder: Path) -> list[Measured]:
    """Every finished result below `folder`, oldest first: of whole comparisons, and of cells without one.

    Looked for: `comparison.json` (a Run) and `cells/*.json` (a cell's file, or a Result as plain JSON). What
    cannot be read is left out.
    """
    files = [*folder.rglob("cells/*.json"), *folder.rglob("comparison.json")] if folder.is_dir() else []
    found = [
        each for path in files for each in (_of_comparison(path) if path.name == "comparison.json" else _of_cell(path))
    ]
    return sorted((each for each in found if each.result.status == "done"), key=lambda each: each.path.stat().st_mtime)


def _of_comparison(path: Path) -> Iterator[Measured]:
    try:
        comparison = msgspec.json.decode(path.read_bytes(), type=Run)
    except (*UNREADABLE, OSError):
        return
    for row in comparison.rows:
        if row.result is not None:
            backend = row.candidate.backend or row.result.job.backend
            yield Measured(backend, row.candidate.options, comparison.setting.model, row.result, path)


def _of_cell(path: Path) -> Iterator[Measured]:
    result = read_cell(path).result
    if result is None:
        try:
            result = msgspec.json.decode(path.read_bytes(), type=Result)
        except (*UNREADABLE, OSError):
            return
    yield Measured(result.job.backend, result.job.options, result.job.model, result, path)


def measured_here(candidates: Sequence[Candidate], model: str, folder: Path) -> dict[str, Measured]:
    """Candidate name -> its newest result on this machine's processor, of this model."""
    processor, found = this_machine().processor, {}
    for each in read_results(folder):
        if each.model != model or each.result.machine is None or each.result.machine.processor != processor:
            continue
        for candidate in candidates:
            if each.backend == candidate.backend and dict(each.options) == dict(candidate.options):
                found[candidate.name] = each
    return found
