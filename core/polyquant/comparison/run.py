"""A comparison from candidates to rows: what is there already is kept, the rest is measured cell by cell."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from polyquant.comparison.candidates import Candidate, parse, with_emulation
from polyquant.comparison.engines.engine import Engine
from polyquant.comparison.engines.local import Local
from polyquant.comparison.engines.measure import CellTask
from polyquant.comparison.jobs import CellPlanner, PlannedCell
from polyquant.comparison.options import CompareOptions, command_line
from polyquant.comparison.progress import ComparisonProgress, SilentComparison
from polyquant.comparison.records import Part, Result, Row, Setting
from polyquant.comparison.reference import chosen_reference, compute_in_child, is_stored
from polyquant.comparison.result import FILE, Comparison
from polyquant.comparison.store import cell_path, comparisons_folder, joined, read_cell, write_cell
from polyquant.comparison.sweep import Sweep, swept
from polyquant.errors import ComparisonBusy, ConfigError
from polyquant.measure.behaviour.prompts import prompts_hash
from polyquant.measure.quality.windows import preset_named
from polyquant.models import builtin
from polyquant.models.hashing import content_hash
from polyquant.models.resolve import resolve_dense
from polyquant.registry.installed import registry
from polyquant.request import ModelSource
from polyquant.support.files import make_folder, write_atomically
from polyquant.support.libraries import installed_version
from polyquant.support.machine import this_machine
from polyquant.support.texts.named import named_text


def compare(
    model: str | Path, candidates: Sequence[str | Candidate], out: Path | None, options: CompareOptions,
    progress: ComparisonProgress | None = None, sweep: Sweep | None = None,
) -> Comparison:  # fmt: skip
    """See `polyquant.compare`."""
    chosen = [parse(each, registry().info) if isinstance(each, str) else each for each in candidates]
    chosen = swept(chosen, sweep or {}, registry().info)
    if options.emulate_activations:
        chosen = [with_emulation(each) for each in chosen]
    _require_candidates(chosen)
    preset_named(options.preset)
    text_name, text = named_text(options.text) if "quality" in options.parts else ("", "")
    source = resolve_dense(model)
    out = out or default_folder(source)
    make_folder(out)
    try:
        with FileLock(str(out / ".lock"), timeout=0):
            return _compare(source, chosen, out, options, text_name, text, progress or SilentComparison())
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
    text: str, progress: ComparisonProgress,
) -> Comparison:  # fmt: skip
    notes = [builtin.CAUTION[source.name]] if source.name in builtin.CAUTION else []
    if emulated := [each.name for each in candidates if each.emulated]:
        notes.append(
            f"activations of {', '.join(emulated)} are emulated, rounded in software: quality is that of kernels which "
            "do so, speed is not"
        )
    referred = {"quality", "behaviour"} & set(options.parts)
    reference = chosen_reference(source, text, options, notes) if referred else None
    planner = CellPlanner(source, options, reference, content_hash(source))
    cells = [planner.plan(candidate) for candidate in candidates]
    setting = Setting(
        model=source.name, model_hash=content_hash(source), device=options.device, parts=options.parts,
        preset=options.preset, text=text_name, windows=options.windows, reference=options.reference,
        tasks=options.tasks,
    )  # fmt: skip
    rows: dict[str, Row] = {}
    tasks = []
    for cell in cells:
        if cell.key in rows:
            notes.append(f"{cell.candidate.name} asks for the same as {rows[cell.key].candidate.name}: one row")
            continue
        kept = read_cell(cell_path(out, cell.key))
        notes += [kept.note] if kept.note else []
        result = cell.refused or kept.result
        rows[cell.key] = _row(cell, result, setting, options)
        missing = () if cell.refused else _missing(result, options)
        if missing:
            tasks += _tasks(cell, missing, options)
            rows[cell.key] = msgspec.structs.replace(rows[cell.key], result=None)

    def comparison() -> Comparison:
        made = Comparison(
            version=installed_version("polyquant") or "", created=datetime.now(UTC).isoformat(timespec="seconds"),
            folder=str(out),
            command=command_line(source.name, [each.name for each in candidates], options), setting=setting,
            machine=this_machine(), rows=tuple(rows.values()), notes=tuple(notes),
        )  # fmt: skip
        write_atomically(out / FILE, made.to_json())
        return made

    progress.begin(list(rows.values()))
    if tasks and reference is not None and not is_stored(reference):
        compute_in_child(reference, out / "work", options, progress)
    for task, new in _engine(options).run(tasks, out / "work", progress):
        path = cell_path(out, task.key)
        before = read_cell(path).result
        result = joined(before if before and before.status == "done" else None, new)
        write_cell(path, result)
        cell = next(cell for cell in cells if cell.key == task.key)
        rows[task.key] = _row(cell, result, setting, options)
        comparison()
        progress.finish(rows[task.key])
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
    same_prompts = result.behaviour is not None and result.behaviour.prompts == prompts_hash()
    old = {"tasks": not same_tasks, "behaviour": not same_prompts}
    return tuple(part for part in options.parts if part not in result.parts or old.get(part))


def _tasks(cell: PlannedCell, missing: Sequence[Part], options: CompareOptions) -> list[CellTask]:
    """One task for all missing parts; where several cells run at a time, speed has one of its own."""
    speed_alone = options.jobs > 1 and options.engine == "local" and "speed" in missing and len(missing) > 1
    groups = [tuple(part for part in missing if part != "speed"), ("speed",)] if speed_alone else [tuple(missing)]
    return [
        CellTask(
            key=cell.key, job=msgspec.structs.replace(cell.job, parts=group), checkpoint=cell.checkpoint,
            limit_seconds=options.timeout_seconds,
        )
        for group in groups
    ]  # fmt: skip


def _row(cell: PlannedCell, result: Result | None, setting: Setting, options: CompareOptions) -> Row:
    command = command_line(setting.model, [cell.candidate.name], options)
    return Row(candidate=cell.candidate, key=cell.key, command=command, result=result)


def _engine(options: CompareOptions) -> Engine:
    if options.engine == "local":
        return Local(options.jobs)
    from polyquant.comparison.engines.cluster import Cluster

    return Cluster(options.address)
