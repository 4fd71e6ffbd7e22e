"""Whether installed backends can run here, wherever each lives."""

from __future__ import annotations

from polyquant.errors import BackendFailed, BrokenBackend
from polyquant.isolated.handles import backend, environment_name
from polyquant.registry.installed import registry
from polyquant.support.devices import choose_device
from polyquant.types import Problem, Record


class Diagnosis(Record, frozen=True):
    """What `doctor` found for one backend on one device."""

    backend: str
    origin: str  # the distribution that provides it
    device: str
    problems: list[Problem]
    environment: str = ""  # the name of its own, where it runs in one

    @property
    def runs(self) -> bool:
        """Whether nothing stops it."""
        return not self.problems


def doctor(name: str | None = None, *, device: str = "auto") -> list[Diagnosis]:
    """Whether each installed backend, or one, can run here; every problem with the command that fixes it."""
    diagnoses = []
    for each in [name] if name else registry().names():
        try:
            handle = backend(each)
            chosen = choose_device(device, handle.capabilities)
            problems, where = handle.problems(chosen), environment_name(handle)
            diagnoses.append(
                Diagnosis(backend=each, origin=handle.origin, device=chosen, problems=problems, environment=where)
            )
        except (BrokenBackend, BackendFailed) as error:
            fix = f"update or uninstall {registry().origin(each)}, or set POLYQUANT_DISABLE={each}"
            broken = Problem(what=str(error), fix=fix, kind="import", detail=str(error.__cause__ or ""))
            diagnoses.append(Diagnosis(backend=each, origin=registry().origin(each), device=device, problems=[broken]))
    return diagnoses
