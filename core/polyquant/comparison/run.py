"""A comparison from candidates to rows: what is there already is kept, the rest is measured cell by cell."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from polyquant.comparison.baseline import chosen_reference, compute_apart
from polyquant.comparison.candidates import Candidate, parse
from polyquant.comparison.engines import local
from polyquant.comparison.engines.measure import Task
from polyquant.comparison.jobs import Plan, Planner
from polyquant.comparison.options import CompareOptions, command_line
from polyquant.comparison.records import Comparison, Part, Result, Row, Setting
from polyquant.comparison.reference import is_stored
from polyquant.comparison.store import cell_path, comparisons_folder, merged, read_cell, write_cell
from polyquant.errors import ComparisonBusy, ConfigError, SaveError
from polyquant.measure.quality.windows import preset_named
from polyquant.models import builtin
from polyquant.models.hashing import content_hash
from polyquant.models.resolve import resolve_dense
from polyquant.registry.installed import registry
from polyquant.request import ModelSource
from polyquant.support.files import write_atomically
from polyquant.support.libraries import installed_version
from polyquant.support.machine import this_machine
from polyquant.support.texts.named import named_text
from polyquant.types import UNREADABLE

FILE = "comparison.json"


class Watcher:
    """Sees a comparison while it runs; this one looks away."""

    def begin(self, rows: Sequence[Row]) -> None:
        """All rows, those that need no measuring with their results."""

    def step(self, key: str, step: str) -> None:
        """What a cell is doing; key: empty for the reference. Called from several threads."""

    def finished(self, row: Row) -> None:
        """A row has its result."""


def compare(
    model: str | Path, candidates: Sequence[str | Candidate], out: Path | None, options: CompareOptions,
    watcher: Watcher | None = None,
) -> Comparison:  # fmt: skip
    """See `polyquant.compare`."""
    chosen = [parse(each, registry().info) if isinstance(each, str) else each for each in candidates]
    _require_candidates(chosen)
    preset_named(options.preset)
    text_name, text = named_text(options.text) if "quality" in options.parts else ("", "")
    source = resolve_dense(model)
    out = out or default_folder(source)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(str(out / ".lock"), timeout=0):
            return _compare(source, chosen, out, options, text_name, text, watcher or Watcher())
    except Timeout:
        raise ComparisonBusy(
            f"another comparison is running in {out}; wait for it, or choose another folder with out= (--out)"
        ) from None


def default_folder(source: ModelSource) -> Path:
    """Where comparisons of a model are kept unless told otherwise: in the cache, by name and content."""
    name = "".join(letter if letter.isalnum() else "-" for letter in source.name.rpartition("/")[2])
    return comparisons_folder() / f"{name}-{content_hash(source)[:8]}"


def _compare(
    source: ModelSource, candidates: Sequence[Candidate], out: Path, options: CompareOptions, text_name: str,
    text: str, watcher: Watcher,
) -> Comparison:  # fmt: skip
    notes = [builtin.CAUTION[source.name]] if source.name in builtin.CAUTION else []
    reference = chosen_reference(source, text, options, notes) if "quality" in options.parts else None
    planner = Planner(source, options, reference, content_hash(source))
    plans = [planner.plan(candidate) for candidate in candidates]
    setting = Setting(
        model=source.name, model_hash=content_hash(source), device=options.device, parts=options.parts,
        preset=options.preset, text=text_name, windows=options.windows, reference=options.reference,
        tasks=options.tasks,
    )  # fmt: skip
    rows: dict[str, Row] = {}
    tasks = []
    for plan in plans:
        if plan.key in rows:
            notes.append(f"{plan.candidate.name} asks for the same as {rows[plan.key].candidate.name}: one row")
            continue
        found = read_cell(cell_path(out, plan.key))
        notes += [found.note] if found.note else []
        result = plan.refused or found.result
        rows[plan.key] = _row(plan, result, setting, options)
        missing = () if plan.refused else _missing(result, options)
        if missing:
            tasks += _tasks(plan, missing, options)
            rows[plan.key] = msgspec.structs.replace(rows[plan.key], result=None)

    def comparison() -> Comparison:
        made = Comparison(
            version=installed_version("polyquant") or "", created=datetime.now(UTC).isoformat(timespec="seconds"),
            folder=str(out),
            command=command_line(source.name, [each.name for each in candidates], options), setting=setting,
            machine=this_machine(), rows=tuple(rows.values()), notes=tuple(notes),
        )  # fmt: skip
        write_atomically(out / FILE, made.to_json())
        return made

    watcher.begin(list(rows.values()))
    if tasks and reference is not None and not is_stored(reference):
        compute_apart(reference, out / "work", options, lambda step: watcher.step("", step))
    for task, new in _engine(options)(tasks, out / "work", watcher.step):
        path = cell_path(out, task.key)
        before = read_cell(path).result
        result = merged(before if before and before.status == "done" else None, new)
        write_cell(path, result)
        plan = next(plan for plan in plans if plan.key == task.key)
        rows[task.key] = _row(plan, result, setting, options)
        comparison()
        watcher.finished(rows[task.key])
    return comparison()


def _require_candidates(candidates: Sequence[Candidate]) -> None:
    if not candidates:
        raise ConfigError("no candidate is named: give some (-c bitsandbytes:nf4), or take all that run here (--all)")
    twice = {each.name for each in candidates if sum(other.name == each.name for other in candidates) > 1}
    if twice:
        raise ConfigError(f"named twice: {', '.join(sorted(twice))}")


def _missing(result: Result | None, options: CompareOptions) -> tuple[Part, ...]:
    """The parts that are still to be measured."""
    if result is None:
        return options.parts
    if result.status == "failed":
        return options.parts if options.retry else ()
    same_tasks = (result.job.tasks, result.job.task_limit, result.job.task_folder) == (
        options.tasks, options.task_limit, options.task_folder,
    )  # fmt: skip
    return tuple(part for part in options.parts if part not in result.parts or (part == "tasks" and not same_tasks))


def _tasks(plan: Plan, missing: Sequence[Part], options: CompareOptions) -> list[Task]:
    """One task for all missing parts; where several cells run at a time, speed has one of its own."""
    apart = options.jobs > 1 and options.engine == "local" and "speed" in missing and len(missing) > 1
    groups = [tuple(part for part in missing if part != "speed"), ("speed",)] if apart else [tuple(missing)]
    return [
        Task(
            key=plan.key, job=msgspec.structs.replace(plan.job, parts=group), making=plan.making,
            limit_seconds=options.timeout_seconds,
        )
        for group in groups
    ]  # fmt: skip


def _row(plan: Plan, result: Result | None, setting: Setting, options: CompareOptions) -> Row:
    command = command_line(setting.model, [plan.candidate.name], options)
    return Row(candidate=plan.candidate, key=plan.key, command=command, result=result)


def _engine(options: CompareOptions) -> local.Engine:
    if options.engine == "local":
        return local.local(options.jobs)
    from polyquant.comparison.engines.ray import cluster

    return cluster(options.address)


def read_comparison(path: str | Path) -> Comparison:
    """The comparison in a folder or a comparison.json. Raises ConfigError where there is none that can be read."""
    file = Path(path)
    file = file / FILE if file.is_dir() else file
    try:
        return msgspec.json.decode(file.read_bytes(), type=Comparison)
    except OSError as error:
        raise ConfigError(f"{path} holds no comparison ({error}); make one with polyquant compare") from error
    except UNREADABLE as error:
        raise SaveError(f"{file} is damaged ({error}); run its polyquant compare again: no cell is lost") from error
