"""Makes a candidate's checkpoint in a process of its own: python -m polyquant.comparison.cell.checkpoint JOB.json."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from polyquant.comparison.records import CheckpointJob
from polyquant.loading.quantize import quantize
from polyquant.support.processes import ParentProgress, run_as_child
from polyquant.support.progress import Step


def main() -> None:
    """Quantize; the checkpoint is there as a whole or not at all."""
    job = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=CheckpointJob)
    ParentProgress().step(Step(what="quantizing"))
    quantize(job.model, job.backend, Path(job.out), device=job.device, overwrite=True, **job.options)


if __name__ == "__main__":
    run_as_child(main)
