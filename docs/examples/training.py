"""Measures LoRA training on every backend that trains here, against LoRA on the dense model in the same setting.

python docs/examples/training.py [--checkpoints DIR] [--out FILE] [NAME ...]     (bitsandbytes:nf4, dense:float32, ...)

Each in a process of its own, same examples, batch of one and 32 tokens, so that weights are what differs. Checkpoints
of backends that do not quantize while loading are looked for in DIR, as measure.py leaves them. The peaks are resident
sets, which other processes do not change; steps a second are what this machine did beside its other work.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import polyquant
from polyquant.cli.show import size
from polyquant.finetuning.options import TrainingOptions
from rich.console import Console

MODEL, DENSE = "builtin:smollm2", "dense"
DATA = Path(__file__).parent / "captain.jsonl"
OPTIONS = TrainingOptions(
    batch_size=1, steps=5, max_length=32, packing=True, completion_only=False, checkpoint_every=5, warmup=0.0
)
LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
HEADINGS = (
    "",
    "computes in",
    "steps/s",
    "peak MiB",
    "libraries MiB",
    "own MiB",
    "less than dense MiB",
    "planned MiB",
    "of it",
)
EXACT = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "1"}
"""Peaks are what is in use: glibc gives freed buffers back, and to the last byte in its main arena alone."""
console = Console(stderr=True)


class Cell(msgspec.Struct, frozen=True):
    """One backend's training, in bytes of resident set."""

    name: str
    compute_dtype: str
    weights_bytes: int  # planned: quantized, and dense in the same dtype
    dense_weights_bytes: int
    peak_bytes: int  # while training
    libraries_bytes: int  # what stays when model and adapters are gone: libraries and the tokenizer
    seconds_per_step: float
    losses: tuple[float, ...]

    @property
    def own_bytes(self) -> int:
        """Peak without what the process takes for its libraries, which differ from backend to backend."""
        return self.peak_bytes - self.libraries_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="all that run here where left out")
    parser.add_argument("--checkpoints", type=Path, default=Path.home() / ".cache" / "polyquant" / "quantized")
    parser.add_argument("--out", type=Path, help="file for the figures, JSON")
    parser.add_argument("--cell", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        (name,) = arguments.names
        arguments.cell.write_bytes(msgspec.json.encode(measure(name, arguments.checkpoints)))
        return
    cells = {}
    for name in arguments.names or candidates(arguments.checkpoints):
        for needed in (f"{DENSE}:{compute_dtype(name)}", name):
            if needed not in cells:
                cells[needed] = apart(needed, arguments.checkpoints)
    if arguments.out:
        arguments.out.write_bytes(msgspec.json.format(msgspec.json.encode(cells)))
    show(cells)


def candidates(checkpoints: Path) -> Iterator[str]:
    """The first preset of every trainable backend that runs here and has what it needs."""
    for info in polyquant.backends(trains=True):
        name = f"{info.name}:{next(iter(info.presets))}"
        problems = polyquant.backend(info.name).problems("cpu")
        if problems:
            console.print(f"{name}: left out, {problems[0].what}")
        elif not info.capabilities.on_the_fly and not (checkpoints / name.replace(":", "-")).exists():
            console.print(f"{name}: left out, no checkpoint {checkpoints / name.replace(':', '-')}")
        else:
            yield name


def compute_dtype(name: str) -> str:
    backend, _, preset = name.partition(":")
    return preset if backend == DENSE else polyquant.backend(backend).info.compute_dtypes["cpu"]


def apart(name: str, checkpoints: Path) -> Cell:
    """The cell, measured in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "cell.json"
        command = [sys.executable, __file__, name, "--checkpoints", str(checkpoints), "--cell", str(result)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **EXACT})
        if ended.returncode:
            sys.exit(f"{name}: {ended.stderr[-2000:]}")
        cell = msgspec.json.decode(result.read_bytes(), type=Cell)
    console.print(f"{name}: peak {size(cell.peak_bytes)}, {1 / cell.seconds_per_step:.2f} steps/s")
    return cell


def measure(name: str, checkpoints: Path) -> Cell:
    """Load, train, and see what is left when the model is gone."""
    import psutil
    from polyquant.finetuning import train
    from polyquant.finetuning.data import read_examples
    from polyquant.finetuning.run import quiet_libraries
    from polyquant.memory.mapped import own_mapped_tensors
    from polyquant.memory.peak import measure_peak

    loaded, planned, dense, checkpoint_bytes = load(name, checkpoints)
    examples = read_examples(DATA, loaded.tokenizer, OPTIONS, OPTIONS.max_length).examples
    targets = [
        f"model.layers.{number}.{linear}"
        for number in range(loaded.model.config.num_hidden_layers)
        for linear in LINEARS
    ]
    own_mapped_tensors(loaded.model, checkpoint_bytes)
    prepared = prepare(loaded)
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        model = train.with_adapters(prepared, targets, OPTIONS)
        ends = [time.perf_counter()]
        with measure_peak() as peak:
            progress = SimpleNamespace(step=lambda _: ends.append(time.perf_counter()))
            trained = train.train(model, examples, [], 0, OPTIONS, Path(folder), None, progress=progress)
    dtype, tokenizer = str(loaded.config.compute_dtype), loaded.tokenizer
    del model, prepared, loaded
    return_freed()
    libraries_bytes = psutil.Process().memory_info().rss
    del tokenizer  # it is the same for all, and counts with the libraries
    assert peak.peak_bytes is not None, "this system gives no peak that can be reset"
    return Cell(
        name=name, compute_dtype=dtype, weights_bytes=planned, dense_weights_bytes=dense,
        peak_bytes=peak.peak_bytes, libraries_bytes=libraries_bytes,
        seconds_per_step=min(later - earlier for earlier, later in pairwise(ends[1:])),
        losses=tuple(step.loss for step in trained.steps),
    )  # fmt: skip


def load(name: str, checkpoints: Path) -> tuple[Any, int, int, int]:
    """A loaded model, dense or quantized; bytes of its plan, of the dense model in its dtype, and of its files."""
    from polyquant.loaded import LoadedModel
    from polyquant.loading import load as loading
    from polyquant.loading.dense import load_dense
    from polyquant.memory.planned import plan_dense
    from polyquant.models import hf
    from polyquant.models.resolve import resolve_dense
    from polyquant.models.weights import list_weights
    from polyquant.options import BackendOptions

    backend, _, preset = name.partition(":")
    source, dtype = resolve_dense(MODEL), compute_dtype(name)
    if backend == DENSE:
        loaded = LoadedModel(
            model=load_dense(source, dtype), tokenizer=hf.load_tokenizer(source),
            config=BackendOptions(compute_dtype=dtype), kernel="torch",
        )  # fmt: skip
    elif (info := polyquant.backend(backend).info).capabilities.on_the_fly:
        loaded = polyquant.load(MODEL, backend, device="cpu", **info.presets[preset])
    else:
        loaded = polyquant.load(checkpoints / f"{backend}-{preset}", backend, device="cpu")
    weights = list_weights(hf.skeleton(source, dtype))
    dense = sum(plan_dense(weight, loaded.config).stored_bytes for weight in weights)
    if backend == DENSE:
        return loaded, dense, dense, source.checkpoint_bytes
    plans = loading.plan(loaded.request.source, loaded.backend, loaded.config)
    planned = sum(plan.stored_bytes for plan in plans)
    return loaded, planned, dense, loaded.request.source.checkpoint_bytes


def show(cells: dict[str, Cell]) -> None:
    """The table, as Markdown."""
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    for cell in cells.values():
        dense = cells[f"{DENSE}:{cell.compute_dtype}"]
        saved, planned = dense.own_bytes - cell.own_bytes, cell.dense_weights_bytes - cell.weights_bytes
        row = [
            cell.name, cell.compute_dtype, f"{1 / cell.seconds_per_step:.2f}",
            *(f"{nbytes / 2**20:.0f}" for nbytes in (cell.peak_bytes, cell.libraries_bytes, cell.own_bytes)),
            *([f"{saved / 2**20:.0f}", f"{planned / 2**20:.0f}", f"{saved / planned:.0%}"] if planned else [""] * 3),
        ]  # fmt: skip
        print(f"| {' | '.join(row)} |")


def prepare(loaded: Any) -> Any:
    from polyquant.plugin import layers

    return (
        layers.frozen_for_adapters(loaded.model)
        if loaded._backend is None
        else loaded.backend.prepare_for_training(loaded)
    )


def return_freed() -> None:
    """What was freed goes back to the system (glibc keeps it), so that the resident set is what is in use."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    main()
