"""Computes a reference in a process of its own: python -m polyquant.comparison.cell.reference JOB.json."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from polyquant.comparison.candidates import DENSE
from polyquant.comparison.records import ReferenceJob
from polyquant.comparison.reference import DENSE_FLOAT32, behaviour_stored, is_stored, quality_stored, reference_job
from polyquant.measure.quality.windows import cut, preset_named
from polyquant.models.resolve import resolve_dense
from polyquant.request import ModelSource
from polyquant.support.files import locked
from polyquant.support.processes import ParentProgress, run_as_child
from polyquant.support.progress import SILENT, Progress

if TYPE_CHECKING:
    from polyquant.loaded import LoadedModel


def main() -> None:
    """Compute the reference that the job asks for."""
    job = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=ReferenceJob)
    compute(job, ParentProgress())


def dense_reference(
    source: ModelSource, text: str, preset: str = "llamacpp-512", *, limit: int | None = None,
    progress: Progress = SILENT,
) -> tuple[Path, str]:  # fmt: skip
    """Folder and key of the stored reference of a dense model in float32; computed in this process where it is missing.

    limit: number of windows at most. Raises ConfigError where the text is shorter than a window.
    """
    job = reference_job(source, text, preset, limit, DENSE_FLOAT32, "cpu")
    if not is_stored(job):
        compute(job, progress)
    return Path(job.folder), job.key


def compute(job: ReferenceJob, progress: Progress = SILENT) -> None:
    """Run the reference over the text, and the prompts if asked for, and store what it predicts and answers, unless
    another process does it meanwhile.

    Raises ConfigError where the text is too short.
    """
    with locked(Path(job.folder)):
        if is_stored(job):
            return
        loaded = _loaded(job)
        if not quality_stored(job):
            _store(job, loaded, progress)
        if not behaviour_stored(job):
            from polyquant.comparison.cell.behaviour import ask
            from polyquant.measure.behaviour import stored

            stored.store(Path(job.folder), ask(loaded, progress))


def _store(job: ReferenceJob, loaded: LoadedModel, progress: Progress) -> None:
    from polyquant.measure.quality import stored

    tokenizer = loaded.tokenizer
    tokens = tokenizer(job.text, add_special_tokens=False).input_ids
    windows = cut(tokens, preset_named(job.preset), bos=tokenizer.bos_token_id, limit=job.limit)
    stored.store(
        Path(job.folder), job.key, job.preset, windows, loaded.logits, progress, spell=tokenizer.convert_ids_to_tokens
    )


def _loaded(job: ReferenceJob) -> LoadedModel:
    from polyquant.loading import dense
    from polyquant.loading.load import load

    candidate = job.candidate
    if candidate.backend != DENSE:
        backend = candidate.backend or None
        return load(candidate.model or job.model, backend, device=job.device, cache=False, **candidate.options)
    source, dtype = resolve_dense(job.model), candidate.options["compute_dtype"]
    return dense.as_loaded(dense.load_dense(source, dtype, job.device), source, dtype)


if __name__ == "__main__":
    run_as_child(main)
