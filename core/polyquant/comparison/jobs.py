"""What has to be done for a candidate: the job of its cell, and the checkpoint that must be made first."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from polyquant.comparison import environments
from polyquant.comparison.candidates import DENSE, EMULATED, Candidate
from polyquant.comparison.options import CompareOptions
from polyquant.comparison.records import CheckpointJob, Job, ReferenceJob, Result
from polyquant.comparison.store import cell_key
from polyquant.errors import PolyquantError
from polyquant.isolated import handles
from polyquant.loading import stored
from polyquant.loading.settle import route_of
from polyquant.models.hashing import content_hash
from polyquant.models.resolve import resolve
from polyquant.registry.installed import registry
from polyquant.request import ModelSource
from polyquant.support.cache import cache_folder
from polyquant.support.machine import Machine, this_machine
from polyquant.types import BackendInfo


class PlannedCell(NamedTuple):
    """What a candidate takes."""

    candidate: Candidate
    key: str
    job: Job
    checkpoint: CheckpointJob | None  # what the job loads, to be made first
    refused: Result | None  # its result where nothing can be measured


class CellPlanner:
    """Plans the candidates of one comparison. Imports neither torch nor any backend's library."""

    def __init__(
        self, source: ModelSource, options: CompareOptions, reference: ReferenceJob | None, model_hash: str
    ) -> None:
        self._source, self._options, self._reference, self._hash = source, options, reference, model_hash

    def plan(self, candidate: Candidate) -> PlannedCell:
        """The job of a candidate; a refusal, not an error, where it cannot be done."""
        job, checkpoint, content = self._job(candidate), None, {"model": self._hash}
        machine = this_machine()
        try:
            if candidate.model:
                own = resolve(candidate.model)
                content["own"] = content_hash(own)
                if not candidate.backend:
                    reader = stored.reader_of(stored.method_of(own), handles.backends())
                    job = msgspec.structs.replace(job, backend=reader)
            if job.backend != DENSE:
                handle = handles.backend(job.backend)
                info = handle.info
                machine = this_machine(library.distribution for library in info.libraries)
                if own_environment := environments.of_backend(job.backend):
                    own_environment.require()
                    content["environment"] = own_environment.name
                if not candidate.model and route_of(self._source, handle) == "make first":
                    checkpoint = self._checkpoint(candidate, info, machine, content.get("environment", ""))
                    own_options = {name: value for name, value in job.options.items() if name in _at_load(info)}
                    job = msgspec.structs.replace(job, model=checkpoint.out, options=own_options)
        except PolyquantError as error:
            refused = Result(job=job, status="failed", reason=f"{type(error).__name__}: {error}", machine=machine)
            return PlannedCell(candidate, cell_key(candidate, job, content, machine), job, None, refused)
        return PlannedCell(candidate, cell_key(candidate, job, content, machine), job, checkpoint, None)

    def _job(self, candidate: Candidate) -> Job:
        options, reference = self._options, self._reference
        return Job(
            model=candidate.model or self._source.name, backend=candidate.backend, options=candidate.options,
            device=options.device, parts=options.parts, reference=reference.folder if reference else "",
            reference_key=reference.key if reference else "",
            dense=self._source.name if not self._source.stored_quantization and not self._source.gguf_file else "",
            tasks=options.tasks, task_folder=options.task_folder, task_limit=options.task_limit,
            speed_limit_seconds=options.speed_limit_seconds,
        )  # fmt: skip

    def _checkpoint(self, candidate: Candidate, info: BackendInfo, machine: Machine, environment: str) -> CheckpointJob:
        """The checkpoint that the candidate needs. Raises PolyquantError where its backend cannot make one."""
        registry().require(info.name, "quantize")
        options: Mapping[str, Any] = {
            name: value for name, value in candidate.options.items() if name not in _at_load(info)
        }
        decides = [self._hash, info.name, options, machine.versions, *([environment] if environment else [])]
        asked = msgspec.json.encode(decides, order="deterministic")
        name = f"{info.name}-{hashlib.sha256(asked).hexdigest()[:16]}"
        return CheckpointJob(
            model=self._source.name, backend=info.name, options=options, device=self._options.device,
            out=str(cache_folder() / "quantized" / name),
        )  # fmt: skip


def _at_load(info: BackendInfo) -> frozenset[str]:
    """Options of a candidate that its checkpoint does not depend on."""
    return info.options.load_time | {EMULATED}
