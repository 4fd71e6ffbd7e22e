"""Foreseen speed beside measured speed, of every preset that quantizes a model while loading it, on an idle machine.

python docs/examples/foresee.py [MODEL]

Each candidate is foreseen, then loaded and measured as `polyquant compare` does. The figures go to
docs/reference/foreseen.json; then `python docs/generate.py` renews the page and its picture.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import polyquant
import torch
from polyquant.comparison.candidates import Candidate
from polyquant.measure.speed import measure_speed
from polyquant.support.machine import this_machine
from polyquant.support.other_work import OtherWork

FIGURES = Path(__file__).parent.parent / "reference" / "foreseen.json"
LIMIT_SECONDS = 4.0


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "builtin:smollm2"
    rows = []
    for candidate in candidates(model):
        if (found := row(model, candidate)) is not None:
            rows.append(found)
            print(msgspec.json.encode(found).decode(), flush=True)
    record = {
        "model": model, "date": datetime.now(UTC).date().isoformat(), "machine": this_machine(("polyquant-kernels",)),
        "rows": rows,
    }  # fmt: skip
    FIGURES.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")


def candidates(model: str) -> Iterator[Candidate]:
    """What runs on the CPU here as it is loaded."""
    return (each.candidate for each in polyquant.plan(model, device="cpu").fitting if not each.fix)


def row(model: str, candidate: Candidate) -> dict[str, Any] | None:
    """One candidate: tokens a second, foreseen and measured; None for one that is not foreseen."""
    options = {"device": "cpu", **candidate.options}
    foreseen = polyquant.plan(model, candidate.backend, speed=True, **options).foreseen
    if foreseen is None or foreseen.why:
        return None
    loaded = polyquant.load(model, candidate.backend, cache=False, **options)
    work = OtherWork()
    measured = measure_speed(loaded.session, loaded.vocabulary, repetitions=3, limit_seconds=LIMIT_SECONDS)
    return {
        "candidate": candidate.name, "other_work_share": work.share(torch.get_num_threads()),
        "generated": {"foreseen": foreseen.generated_tokens_per_second,
                      "measured": measured.generated_tokens_per_second.mean},
        "prompt": {"foreseen": foreseen.prompt_tokens_per_second, "measured": measured.prompt_tokens_per_second.mean},
    }  # fmt: skip


if __name__ == "__main__":
    main()
