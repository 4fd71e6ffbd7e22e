"""The reference of a comparison as it was asked for: a candidate, the dense model, or a folder; computed apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from polyquant.comparison.candidates import Candidate, parse
from polyquant.comparison.options import CompareOptions
from polyquant.comparison.reference import ReferenceJob, reference_job
from polyquant.errors import BackendFailed, ConfigError
from polyquant.measure.quality.index import INDEX
from polyquant.registry.installed import registry
from polyquant.request import ModelSource
from polyquant.support.files import write_atomically
from polyquant.support.processes import account, run_logged
from polyquant.types import UNREADABLE


def chosen_reference(source: ModelSource, text: str, options: CompareOptions, notes: list[str]) -> ReferenceJob:
    """The job of the reference that `options` name; what the report should say of it goes to `notes`."""
    folder = Path(options.reference).expanduser()
    if (folder / INDEX).is_file():
        try:
            stored = msgspec.json.decode((folder / INDEX).read_bytes(), type=dict[str, Any])
        except UNREADABLE as error:
            raise ConfigError(f"{folder / INDEX} is damaged ({error}); measure the reference again") from error
        if stored.get("preset") != options.preset:
            raise ConfigError(
                f"{folder} holds a reference of the preset {stored.get('preset')}, and {options.preset} is asked for; "
                f"give --preset {stored.get('preset')}"
            )
        notes.append(f"the reference is what {folder} holds; its text and model are not known here")
        return msgspec.structs.replace(
            reference_job(source, text, options.preset, options.windows or None, Candidate(name="", backend=""), ""),
            folder=str(folder.absolute()), key=str(stored.get("key")),
        )  # fmt: skip
    candidate = parse(options.reference, registry().info)
    if candidate.options.get("compute_dtype") != "float32" or candidate.backend != "dense":
        notes.append(f"the reference is {candidate.name}, not the dense model in float32")
    return reference_job(source, text, options.preset, options.windows or None, candidate, options.device)


def compute_apart(reference: ReferenceJob, work: Path, options: CompareOptions, tell: Callable[[str], None]) -> None:
    """The reference, in a process of its own. Raises BackendFailed with its last words."""
    work.mkdir(parents=True, exist_ok=True)
    job, log = work / f"reference-{reference.key}.json", work / f"reference-{reference.key}.log"
    write_atomically(job, reference.to_json())
    tell("reference")
    ended = run_logged(
        "polyquant.comparison.reference", [str(job)], log, limit_seconds=options.timeout_seconds, tell=tell
    )
    job.unlink(missing_ok=True)
    if ended.code != 0:
        raise BackendFailed(
            f"the reference {options.reference} could not be computed: "
            f"{account(ended, options.timeout_seconds)}\n"
            "Where it does not fit, compare with another one: --reference dense:bfloat16, or a backend"
        )
    log.unlink(missing_ok=True)
