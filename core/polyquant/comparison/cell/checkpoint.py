"""Makes a candidate's checkpoint in a process of its own: python -m polyquant.comparison.cell.checkpoint JOB.json."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from polyquant.loading.quantize import quantize
from polyquant.support.processes import run_as_child, say
from polyquant.types import Record


class Making(Record, frozen=True):
    """A checkpoint to make with a backend that quantizes offline."""

    model: str
    backend: str
    options: Mapping[str, Any]
    device: str
    out: str


def main() -> None:
    """Quantize; the checkpoint is there as a whole or not at all."""
    job = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Making)
    say("quantizing")
    quantize(job.model, job.backend, Path(job.out), device=job.device, overwrite=True, **job.options)


if __name__ == "__main__":
    run_as_child(main)
