"""The reference of a comparison: its log-probabilities on a text, computed once and kept in the cache.

In a process of its own: python -m polyquant.comparison.reference JOB.json.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from polyquant.comparison.candidates import DENSE, Candidate
from polyquant.measure.quality.index import stored_in
from polyquant.measure.quality.windows import cut, preset_named
from polyquant.models.hashing import content_hash
from polyquant.models.resolve import resolve_dense
from polyquant.request import ModelSource
from polyquant.support.cache import cache_folder
from polyquant.support.files import locked
from polyquant.support.machine import this_machine
from polyquant.support.processes import run_as_child, say
from polyquant.types import Record

if TYPE_CHECKING:
    from polyquant.loaded import LoadedModel

REFERENCE = Candidate(name="dense", backend=DENSE, options={"compute_dtype": "float32"})


class ReferenceJob(Record, frozen=True):
    """What to compute, and where it goes."""

    model: str
    text: str
    preset: str
    limit: int | None
    candidate: Candidate
    device: str
    folder: str
    key: str


def reference(
    source: ModelSource,
    text: str,
    preset: str = "llamacpp-512",
    *,
    limit: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> tuple[Path, str]:
    """Folder and key of the stored reference of a dense model in float32; computed where it is not there yet.

    limit: number of windows at most. Raises ConfigError where the text is shorter than a window.
    """
    job = reference_job(source, text, preset, limit, REFERENCE, "cpu")
    if not is_stored(job):
        compute(job, advance)
    return Path(job.folder), job.key


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
    """Whether it has been computed already."""
    return stored_in(Path(job.folder), job.key) is not None


def compute(job: ReferenceJob, advance: Callable[[int], None] | None = None) -> None:
    """Run the reference over the text, and store what it predicts, unless another process does it meanwhile.

    Raises ConfigError where the text is too short.
    """
    with locked(Path(job.folder)):
        if not is_stored(job):
            _store(job, advance)


def _store(job: ReferenceJob, advance: Callable[[int], None] | None) -> None:
    from polyquant.measure.quality import stored

    loaded = _loaded(job)
    tokenizer = loaded.tokenizer
    tokens = tokenizer(job.text, add_special_tokens=False).input_ids
    windows = cut(tokens, preset_named(job.preset), bos=tokenizer.bos_token_id, limit=job.limit)
    stored.store(
        Path(job.folder), job.key, job.preset, windows, loaded.logits, advance, spell=tokenizer.convert_ids_to_tokens
    )


def _loaded(job: ReferenceJob) -> LoadedModel:
    from polyquant.loading import dense
    from polyquant.loading.load import load

    candidate = job.candidate
    if candidate.backend != DENSE:
        backend = candidate.backend or None
        return load(candidate.model or job.model, backend, device=job.device, **candidate.options)
    source, dtype = resolve_dense(job.model), candidate.options["compute_dtype"]
    return dense.as_loaded(dense.load_dense(source, dtype, job.device), source, dtype)


def main() -> None:
    """Compute the job's reference, and say how far it is."""
    job = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=ReferenceJob)
    compute(job, lambda done: say(f"reference, window {done}"))


if __name__ == "__main__":
    run_as_child(main)
