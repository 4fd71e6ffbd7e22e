"""Whether installed backends can run here, wherever each lives."""

from __future__ import annotations

from polyquant.errors import BackendFailed, BrokenBackend
from polyquant.isolated.handles import backend, environment_name
from polyquant.registry.installed import registry
from polyquant.support.devices import choose_device
from polyquant.support.shown import Look, Looked
from polyquant.types import Problem, Record


class Diagnosis(Record, frozen=True):
    """What `doctor` found for one backend on one device."""

    backend: str
    origin: str  # the distribution that provides it
    device: str
    problems: list[Problem]
    environment: str = ""  # the name of its own, where it runs in one
    notes: tuple[str, ...] = ()  # what importing its plugin did to others: it printed, or took long

    @property
    def runs(self) -> bool:
        """Whether nothing stops it."""
        return not self.problems


class Diagnoses(Looked, list[Diagnosis]):
    """What `doctor` found, a backend each."""

    def look(self) -> Look:
        rows = [
            (each.backend, "runs" if each.runs else "does not run", each.device, problem.what, problem.fix)
            for each in self
            for problem in each.problems or [Problem(what="", fix="")]
        ]
        notes = [f"{each.backend} {note}" for each in self for note in each.notes]
        running = sum(each.runs for each in self)
        return Look(f"{running} of {len(self)} backends run here", ("backend", "", "on", "problem", "fix"), rows, notes)


def doctor(name: str | None = None, *, device: str = "auto", seconds: float | None = None) -> Diagnoses:
    """Whether each installed backend, or one, can run here; every problem with the command that fixes it.

    seconds: how long each may take to answer; None: 60, and 240 in an environment of its own. One that has not answered
    by then is told with the line it is at.
    """
    diagnoses = Diagnoses()
    for each in [name] if name else registry().names():
        where = ""
        try:
            handle = backend(each)
            chosen = choose_device(device, handle.capabilities)
            problems, where = handle.problems_in_time(chosen, seconds), environment_name(handle)
        except (BrokenBackend, BackendFailed) as error:
            fix = f"update or uninstall {registry().origin(each)}, or set POLYQUANT_DISABLE={each}"
            chosen = device
            problems = [Problem(what=str(error), fix=fix, kind="import", detail=str(error.__cause__ or ""))]
        found = Diagnosis(
            backend=each, origin=registry().origin(each), device=chosen, problems=problems, environment=where,
            notes=tuple(registry().complaints(each)),
        )  # fmt: skip
        diagnoses.append(found)
    return diagnoses
