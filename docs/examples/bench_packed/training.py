"""Seconds a step of LoRA on every quantized linear layer: packed against the library, of each backend that trains."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import polyquant
from polyquant.finetuning.options import TrainingStep
from polyquant.support.progress import Progress, Step
from polyquant.support.texts import evaluation_text

from bench_packed.cells import Asked, Cell, Figures, Sizes, Source, load_packed, load_with_library, run
from bench_packed.presets import LeftOut, packed_presets
from bench_packed.sources import made

RANK, BATCH = 8, 1
FIGURES = {"seconds": "seconds a step", "loss": "loss at the end", "compute_dtype": "in", "kernel": "kernel"}
COMPARED, RATIO = ("seconds",), "ratio: to the library"


class Clock(Progress):
    """When each step of training ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def step(self, step: Step) -> None:
        if isinstance(step, TrainingStep):
            self.ends.append(perf_counter())


def cells(asked: Asked) -> Iterator[Cell | LeftOut]:
    """The first preset with a place in the layout of each backend that trains."""
    seen = set()
    for preset in packed_presets():
        if isinstance(preset, LeftOut):
            yield preset
            continue
        if preset.backend in seen or not polyquant.backend(preset.backend).capabilities.trains:
            continue
        seen.add(preset.backend)
        job = {"backend": preset.backend, "options": preset.options}
        theirs = f"{preset.name} library"
        yield Cell(name=theirs, source=preset.source, sizes=asked.sizes, job={**job, "packed": False})
        yield Cell(
            name=f"{preset.name} packed", source=preset.source, sizes=asked.sizes, job={**job, "packed": True},
            against=theirs,
        )  # fmt: skip


def measure(source: Source, sizes: Sizes, backend: str, options: dict[str, Any], packed: bool) -> Figures:
    load = load_packed if packed else load_with_library
    loaded = load(made(source), backend, **options)
    clock = Clock()
    with TemporaryDirectory() as folder:
        data = Path(folder) / "text.txt"
        data.write_text(evaluation_text(), encoding="utf-8")
        tuned = polyquant.finetune(
            loaded, data, Path(folder) / "adapter", rank=RANK, batch_size=BATCH, steps=sizes.steps + 1,
            max_length=sizes.trained_tokens, packing=True, progress=clock,
        )  # fmt: skip
    taken = [later - earlier for earlier, later in pairwise(clock.ends)]  # without the first, which gets warm
    return {
        "seconds": sum(taken) / len(taken),
        "loss": tuned.last_loss,
        "compute_dtype": str(loaded.config.compute_dtype),
        "kernel": loaded.kernel,
    }


if __name__ == "__main__":
    run(measure)
