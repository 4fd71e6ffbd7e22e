"""One cell of a comparison, in a process of its own: python -m polyquant.comparison.cell.run JOB.json RESULT.json."""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter, time
from typing import Any

import msgspec
import psutil

from polyquant.comparison.candidates import DENSE
from polyquant.comparison.records import Job, Result
from polyquant.isolated import handles
from polyquant.loaded import LoadedModel
from polyquant.loading.load import load
from polyquant.loading.verify import verify
from polyquant.measure.speed import measure_speed
from polyquant.support.files import write_atomically
from polyquant.support.machine import this_machine, usable_cores
from polyquant.support.malloc import freeing_at_once
from polyquant.support.other_work import OtherWork
from polyquant.support.processes import ParentProgress, end_with_parent
from polyquant.support.progress import SILENT, Progress, Step


def main() -> None:
    """Read the job, measure, write the result in one step."""
    end_with_parent()
    job_path, result_path = map(Path, sys.argv[1:])
    job = msgspec.json.decode(job_path.read_bytes(), type=Job)
    _libraries()
    imported = time() - psutil.Process().create_time()
    result = msgspec.structs.replace(run(job, ParentProgress()), import_seconds=imported)
    write_atomically(result_path, result.to_json())


def run(job: Job, progress: Progress = SILENT) -> Result:
    """Load, verify, and measure what the job asks for. Whatever fails becomes the result's reason."""
    measured: dict[str, Any] = {}
    started = perf_counter()
    try:
        measured |= _conditions(job)
        progress.step(Step(what="loading"))
        loaded = _load(job, measured)
        if job.backend != DENSE:
            progress.step(Step(what="verifying"))
            with freeing_at_once():
                measured |= verified(loaded)  # first: some kernels repack weights in their first forward pass
                _leave_files(loaded)
        for part in job.parts:
            _measure(part, loaded, job, measured, progress)
            measured["parts"] = (*measured.get("parts", ()), part)
    except Exception as error:  # of the backend's library: a row of the comparison, with its reason
        measured["own_seconds"] = perf_counter() - started
        return Result(job=job, status="failed", reason=f"{type(error).__name__}: {error}", **measured)
    return Result(job=job, status="done", own_seconds=perf_counter() - started, **measured)


def _libraries() -> None:
    """Import what every cell needs, so that it does not count as loading."""
    import torch  # noqa: F401
    import transformers  # noqa: F401


def _conditions(job: Job) -> dict[str, Any]:
    """What it is measured on."""
    import torch

    libraries = () if job.backend in (DENSE, "") else handles.backend(job.backend).info.libraries
    machine = this_machine(library.distribution for library in libraries)
    return {"machine": machine, "threads": torch.get_num_threads()}


def _load(job: Job, measured: dict[str, Any]) -> LoadedModel:
    if job.backend == DENSE:
        return _dense(job, measured)
    # without the cache: a cell's time and peak are of quantizing, whoever has quantized the same before
    return load(job.model, job.backend or None, device=job.device, return_freed_memory=True, cache=False, **job.options)


def _dense(job: Job, measured: dict[str, Any]) -> LoadedModel:
    """The dense model, for the rows that the others are read against."""
    from polyquant.loading import dense
    from polyquant.memory.storage import stored_bytes
    from polyquant.models.resolve import resolve_dense

    source, dtype = resolve_dense(job.model), job.options.get("compute_dtype", "float32")
    started = perf_counter()
    model = dense.load_dense(source, dtype, job.device)
    measured |= {
        "load_seconds": perf_counter() - started, "compute_dtype": dtype, "kernel": "torch",
        "device": model.device.type, "stored_bytes": stored_bytes(model),
    }  # fmt: skip
    return dense.as_loaded(model, source, dtype)


def verified(loaded: LoadedModel) -> dict[str, Any]:
    """What the verification of the model adds to a result."""
    report = verify(loaded)
    return {
        "kernel": report.kernel,
        "compute_dtype": report.compute_dtype,
        "device": report.device,
        "load_seconds": report.load_seconds,
        "memory": report.memory,
        "stored_bytes": report.memory.weights_stored_bytes,
        "bits_per_weight": report.memory.quantized_bits_per_weight,
        "checks": tuple(report.checks),
        "notes": tuple(report.notes),
        "emulated_activations": report.emulated_activations,
    }


def _leave_files(loaded: LoadedModel) -> None:
    """Let go of pages of the checkpoint's files that are in memory for a few dense tensors' sake."""
    import torch

    from polyquant.memory.mapped import own_mapped_tensors

    if loaded.request is not None and isinstance(loaded.model, torch.nn.Module):
        own_mapped_tensors(loaded.model, loaded.request.source.checkpoint_bytes)


def _measure(part: str, loaded: LoadedModel, job: Job, measured: dict[str, Any], progress: Progress) -> None:
    """One part of the job, into `measured`."""
    if part == "quality":
        from polyquant.comparison.cell.layers import layers_of
        from polyquant.comparison.cell.quality import measure_quality

        measured["quality"] = measure_quality(loaded, Path(job.reference), job.reference_key, progress)
        if job.backend != DENSE:
            progress.step(Step(what="layers"))
            measured["layers"] = layers_of(loaded, job.dense)
    elif part == "speed":
        progress.step(Step(what="speed"))
        others = OtherWork()
        measured["speed"] = measure_speed(loaded.session, loaded.vocabulary, limit_seconds=job.speed_limit_seconds)
        measured["other_work_share"] = others.share(min(measured["threads"], len(usable_cores())))
    elif part == "behaviour":
        from polyquant.comparison.cell.behaviour import measure_behaviour

        measured["behaviour"] = measure_behaviour(loaded, Path(job.reference), progress)
    else:
        from polyquant.comparison.cell.tasks import measure_tasks

        measured["scores"] = measure_tasks(loaded, job, progress)


if __name__ == "__main__":
    main()
