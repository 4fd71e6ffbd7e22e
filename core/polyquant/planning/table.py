"""Every installed backend's presets on one model: what fits, what does not, and what is not installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from polyquant.comparison.candidates import Candidate, presets_of
from polyquant.errors import BrokenBackend, CheckpointConflict, ConfigError, PolyquantError
from polyquant.isolated import handles
from polyquant.loading.settle import as_flags, make_command, route_of
from polyquant.planning.devices import Budget, free_bytes, read_budget
from polyquant.planning.model import PlannedModel
from polyquant.planning.plan import DENSE, Asked, plan_one
from polyquant.planning.process import problems_of
from polyquant.planning.records import Absent, Plan, PlannedRow, Plans
from polyquant.planning.scale import standing
from polyquant.registry.backend import Backend
from polyquant.registry.catalogue import catalogue
from polyquant.registry.installed import registry
from polyquant.support.sizes import size

ORDER = ("fits", "too big", "not planned", "does not run", "left out")


def plan_model(
    model: str | Path, backend: str | None, options: Mapping[str, object], asked: Asked, memory: int | str | None,
    devices: str | None, *, revision: str | None, trust_remote_code: bool,
) -> Plan | Plans:  # fmt: skip
    """See `polyquant.plan`; options: the backend's own, as the user wrote them."""
    backend, options = handles.written(backend, options)
    if backend is None and options:
        raise ConfigError(f"name the backend that {', '.join(options)} belongs to (backend=...), or leave it out")
    handle = handles.backend(backend) if backend is not None else None
    if handle is not None:
        handle.config(options)  # raises for wrong options before any file is read
    budget = read_budget(memory, devices)
    found = PlannedModel(model, revision=revision, trust_remote_code=trust_remote_code)
    if handle is None:
        return plan_all(found, asked, budget)
    problems_of(handle, "cpu")  # imports what the backend imports, so that the process is weighed with it
    return plan_one(found, handle, options, asked, budget)


def plan_all(model: PlannedModel, asked: Asked, budget: Budget) -> Plans:
    """A row for each candidate, what fits first; a backend that is broken or refuses the model has its reason there."""
    device = _device(asked, budget)
    if budget.memory is None and not budget.devices:
        budget = Budget(free_bytes(device))
    rows = [row for name in registry().names() for row in _rows_of(name, model, asked, budget)]
    return Plans(
        model=model.name,
        device=device,
        memory_bytes=budget.total_bytes(device),
        rows=tuple(sorted(rows, key=_place)),
        absent=tuple(
            Absent(backend=name, command=known.command)
            for name, known in catalogue().items()
            if name not in registry().names()
        ),
    )


def _device(asked: Asked, budget: Budget) -> str:
    from polyquant.support.devices import available_devices

    if budget.devices:
        return budget.kind
    return asked.device if asked.device != "auto" else available_devices()[0].partition(":")[0]


def _rows_of(name: str, model: PlannedModel, asked: Asked, budget: Budget) -> Iterator[PlannedRow]:
    """The rows of one backend."""
    try:
        backend = handles.backend(name)
    except BrokenBackend as error:
        yield PlannedRow(
            candidate=Candidate(name=name, backend=name), status="does not run", reason=str(error),
            fix=f"update or uninstall {registry().origin(name)}, or set POLYQUANT_DISABLE={name}",
        )  # fmt: skip
        return
    for candidate in candidates_of(backend, model):
        yield _row(candidate, backend, model, asked, budget)


def candidates_of(backend: Backend, model: PlannedModel) -> list[Candidate]:
    """Its presets; for a checkpoint that it reads as it is, that checkpoint."""
    try:
        stored = route_of(model.source, backend) == "as stored"
    except CheckpointConflict:  # every preset's row says why
        stored = False
    return [Candidate(name=backend.name, backend=backend.name)] if stored else presets_of(backend.info)


def _row(candidate: Candidate, backend: Backend, model: PlannedModel, asked: Asked, budget: Budget) -> PlannedRow:
    device = _device(asked, budget)
    try:
        problems = problems_of(backend, device)
    except PolyquantError as error:  # a plugin that raises where it should answer is out, like one that says why
        return PlannedRow(candidate=candidate, status="does not run", reason=str(error))
    try:
        plan = plan_one(model, backend, candidate.options, _on(asked, device), budget)
    except PolyquantError as error:
        if problems:
            return PlannedRow(candidate=candidate, status="does not run", reason=problems[0].what, fix=problems[0].fix)
        return PlannedRow(candidate=candidate, status="not planned", reason=str(error).partition("\n")[0])
    if problems:
        return PlannedRow(
            candidate=candidate, status="does not run", reason=problems[0].what, fix=problems[0].fix, plan=plan
        )
    if DENSE in plan.notes:
        return PlannedRow(candidate=candidate, status="left out", reason=DENSE, plan=plan)
    if not plan.fits or plan.spilled:
        over = plan.needed_bytes - plan.memory_bytes
        reason = f"needs {size(plan.needed_bytes)}, {size(over)} more than there is" if over > 0 else plan.notes[-1]
        return PlannedRow(candidate=candidate, status="too big", reason=reason, plan=plan)
    made = make_command(model.name, backend, candidate.options) if plan.route == "make first" else ""
    return PlannedRow(candidate=candidate, status="fits", fix=made, plan=plan)


def _on(asked: Asked, device: str) -> Asked:
    return Asked(context=asked.context, batch=asked.batch, kv_cache=asked.kv_cache, device=device, speed=asked.speed)


def load_command(candidate: Candidate, model: str) -> str:
    """The command that loads and verifies a candidate."""
    return f"polyquant verify {model} --backend {candidate.backend}{as_flags(candidate.options)}"


def _place(row: PlannedRow) -> tuple[Any, ...]:
    """What fits first; of that, what should lose least by what is declared and published, then the smaller."""
    plan = row.plan
    if plan is None:
        return (ORDER.index(row.status), 0, 0, row.candidate.name)
    return (ORDER.index(row.status), *standing(plan).order, plan.needed_bytes, row.candidate.name)
