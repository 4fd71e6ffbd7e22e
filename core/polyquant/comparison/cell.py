"""One cell of a comparison, in a process of its own: python -m polyquant.comparison.cell JOB.json RESULT.json."""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec

import polyquant
from polyquant.candidates import DENSE
from polyquant.comparison.records import Job, Result
from polyquant.errors import PolyquantError
from polyquant.loaded import LoadedModel
from polyquant.machine import this_machine
from polyquant.options import BackendOptions
from polyquant.quality.records import Quality
from polyquant.speed import measure_speed


def main() -> None:
    """Read the job, measure, write the result in one step."""
    job_path, result_path = map(Path, sys.argv[1:])
    result = run(msgspec.json.decode(job_path.read_bytes(), type=Job))
    partial = result_path.with_suffix(".partial")
    partial.write_text(result.to_json())
    partial.replace(result_path)


def run(job: Job) -> Result:
    """Load, verify, and measure what the job asks for. Whatever fails becomes the result's reason."""
    measured: dict[str, Any] = {}
    try:
        loaded = _load(job, measured)
        if job.backend != DENSE:
            measured |= verified(loaded)  # first: some kernels repack weights in their first forward pass
        if job.reference:
            measured["quality"] = measure_quality(loaded, Path(job.reference), job.reference_key)
        if job.speed:
            import torch

            measured["threads"] = torch.get_num_threads()
            measured["speed"] = measure_speed(
                loaded.session, _vocabulary(loaded), limit_seconds=job.speed_limit_seconds
            )
    except Exception as error:  # of the backend's library: a row of the comparison, with its reason
        return Result(job=job, status="failed", reason=f"{type(error).__name__}: {error}", **measured)
    return Result(job=job, status="done", **measured)


def _load(job: Job, measured: dict[str, Any]) -> LoadedModel:
    if job.backend == DENSE:
        measured["machine"] = this_machine()
        return _dense(job, measured)
    info = polyquant.backend(job.backend).info
    measured["machine"] = this_machine(library.distribution for library in info.libraries)
    return polyquant.load(job.model, job.backend, device=job.device, **job.options)


def _dense(job: Job, measured: dict[str, Any]) -> LoadedModel:
    """The dense model, for the rows that the others are read against."""
    from polyquant import hf
    from polyquant.models.resolve import resolve

    source, dtype = resolve(job.model), job.options.get("compute_dtype", "float32")
    started = perf_counter()
    model = hf.load_dense(source, dtype)
    measured |= {"load_seconds": perf_counter() - started, "compute_dtype": dtype, "kernel": "torch", "device": "cpu"}
    return LoadedModel(
        model=model, tokenizer=hf.load_tokenizer(source), config=BackendOptions(compute_dtype=dtype), kernel="torch"
    )


def verified(loaded: LoadedModel) -> dict[str, Any]:
    """What the verification of the model adds to a result."""
    report = polyquant.verify(loaded)
    return {
        "kernel": report.kernel,
        "compute_dtype": report.compute_dtype,
        "device": report.device,
        "load_seconds": report.load_seconds,
        "memory": report.memory,
        "bits_per_weight": report.memory.quantized_bits_per_weight,
        "checks": tuple(report.checks),
        "notes": tuple(report.notes),
    }


def measure_quality(loaded: LoadedModel, folder: Path, key: str) -> Quality:
    """The model against stored log-probabilities, window by window. Raises PolyquantError where they are not there."""
    import torch

    from polyquant.quality import stored
    from polyquant.quality.metrics import Comparison

    index = stored.stored_in(folder, key)
    if index is None:
        raise PolyquantError(f"{folder} holds no reference with the key {key}; measure the reference again")
    comparison = Comparison()
    for window, reference in stored.read(folder, index):
        candidate = stored.scored(loaded.logits(window.tokens), window)
        comparison.add(reference, candidate.cpu(), torch.tensor(window.tokens[window.first_scored :]))
    return comparison.result(index.preset, storage_error=index.storage_error)


def _vocabulary(loaded: LoadedModel) -> int:
    return int(loaded.logits([0]).shape[-1])


if __name__ == "__main__":
    main()
