"""The reference of a comparison: its log-probabilities on a text, computed once and kept in the cache."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from polyquant.comparison.candidates import DENSE, Candidate, parse
from polyquant.comparison.options import CompareOptions
from polyquant.comparison.records import ReferenceJob
from polyquant.errors import BackendFailed, ConfigError
from polyquant.measure.behaviour.stored import answers_in
from polyquant.measure.quality.index import INDEX, stored_in
from polyquant.measure.quality.windows import preset_named
from polyquant.models.hashing import content_hash
from polyquant.registry.installed import registry
from polyquant.request import ModelSource
from polyquant.support.cache import cache_folder
from polyquant.support.files import write_atomically
from polyquant.support.machine import this_machine
from polyquant.support.processes import account, run_logged
from polyquant.support.progress import Progress, Step
from polyquant.types import UNREADABLE

DENSE_FLOAT32 = Candidate(name="dense", backend=DENSE, options={"compute_dtype": "float32"})


def chosen_reference(source: ModelSource, text: str, options: CompareOptions, notes: list[str]) -> ReferenceJob:
    """The job of the reference that `options` name: a candidate, the dense model, or a folder.

    What the report should say of it goes to `notes`.
    """
    folder = Path(options.reference).expanduser()
    if (folder / INDEX).is_file():
        return _reference_in(folder, source, text, options, notes)
    candidate = parse(options.reference, registry().info)
    if candidate.options.get("compute_dtype") != "float32" or candidate.backend != DENSE:
        notes.append(f"the reference is {candidate.name}, not the dense model in float32")
    job = reference_job(source, text, options.preset, options.windows or None, candidate, options.device)
    return msgspec.structs.replace(job, **_wanted(options))


def _wanted(options: CompareOptions) -> dict[str, bool]:
    return {"quality": "quality" in options.parts, "behaviour": "behaviour" in options.parts}


def _reference_in(
    folder: Path, source: ModelSource, text: str, options: CompareOptions, notes: list[str]
) -> ReferenceJob:
    try:
        stored = msgspec.json.decode((folder / INDEX).read_bytes(), type=dict[str, Any])
    except UNREADABLE as error:
        raise ConfigError(f"{folder / INDEX} is damaged ({error}); measure the reference again") from error
    if stored.get("preset") != options.preset:
        raise ConfigError(
            f"{folder} holds a reference of the preset {stored.get('preset')}, and {options.preset} is asked for; "
            f"give --preset {stored.get('preset')}"
        )
    if "behaviour" in options.parts and answers_in(folder) is None:
        raise ConfigError(
            f"{folder} holds no answers to the prompts of behaviour; leave behaviour out, or name a candidate as "
            "the reference (--reference dense)"
        )
    notes.append(f"the reference is what {folder} holds; its text and model are not known here")
    return msgspec.structs.replace(
        reference_job(source, text, options.preset, options.windows or None, Candidate(name="", backend=""), ""),
        folder=str(folder.absolute()), key=str(stored.get("key")), **_wanted(options),
    )  # fmt: skip


def reference_job(
    source: ModelSource, text: str, preset: str, limit: int | None, candidate: Candidate, device: str
) -> ReferenceJob:
    """The job of a reference; imports neither torch nor a backend's library."""
    tokenizer = [path.read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")
                 if (path := source.path / name).is_file()]  # fmt: skip
    asked = (preset_named(preset), limit, text, candidate.backend, sorted(candidate.options.items()), candidate.model)
    content = (content_hash(source), [hashlib.sha256(part).hexdigest() for part in tokenizer])
    key = hashlib.sha256(repr((content, asked, sorted(this_machine().versions.items()))).encode()).hexdigest()[:32]
    folder = cache_folder() / "references" / key
    return ReferenceJob(
        model=source.name, text=text, preset=preset, limit=limit, candidate=candidate, device=device,
        folder=str(folder), key=key,
    )  # fmt: skip


def is_stored(job: ReferenceJob) -> bool:
    """Whether all that is wanted of it has been computed already."""
    return quality_stored(job) and behaviour_stored(job)


def quality_stored(job: ReferenceJob) -> bool:
    """Whether its log-probabilities are there, or not wanted."""
    return not job.quality or stored_in(Path(job.folder), job.key) is not None


def behaviour_stored(job: ReferenceJob) -> bool:
    """Whether its answers are there, or not wanted."""
    return not job.behaviour or answers_in(Path(job.folder)) is not None


def compute_in_child(job: ReferenceJob, work: Path, options: CompareOptions, progress: Progress) -> None:
    """The reference, in a process of its own. Raises BackendFailed with its last words.

    work: folder for the files of the process; what a failed one printed stays there.
    """
    work.mkdir(parents=True, exist_ok=True)
    job_path, log = work / f"reference-{job.key}.json", work / f"reference-{job.key}.log"
    write_atomically(job_path, job.to_json())
    progress.step(Step(what="reference"))
    ended = run_logged(
        "polyquant.comparison.cell.reference", [str(job_path)], log, limit_seconds=options.timeout_seconds,
        progress=progress,
    )  # fmt: skip
    job_path.unlink(missing_ok=True)
    if ended.code != 0:
        raise BackendFailed(
            f"the reference {options.reference} could not be computed: "
            f"{account(ended, options.timeout_seconds)}\n"
            "Where it does not fit, compare with another one: --reference dense:bfloat16, or a backend"
        )
    log.unlink(missing_ok=True)
