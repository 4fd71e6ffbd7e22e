"""What loads of dense checkpoints add to the process at their peak, beside what is kept of them and what is planned.

python docs/examples/peaks.py [--model NAME] [CANDIDATE ...]

Every preset of every backend that quantizes while it loads, in a process of its own, with polyquant's kernels and with
the library's where there are both. The models: SmolLM2-135M-Instruct, and a random Llama of a billion parameters, in
bfloat16, in a temporary folder (TMPDIR, 2 GB). The figures go to docs/reference/peaks.json, beside those that are not
measured this time; then `python docs/generate.py` renews the page. Other work on the machine changes none of them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

import msgspec
import polyquant
from polyquant.comparison.candidates import parse, presets_of
from polyquant.testing.models import tiny_model, write_random

PEAKS = Path(__file__).parent.parent / "reference" / "peaks.json"
BILLION = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 2048,
    "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SAMPLED_SECONDS = 0.002
SMALL, LARGE = "SmolLM2-135M", "random Llama, 1 B"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidates", nargs="*", help="as of comparisons; every preset that runs here where left out")
    parser.add_argument("--model", choices=(SMALL, LARGE), help="one of the two")
    parser.add_argument("--folder", type=Path, help="where the random model is written, and kept")
    parser.add_argument("--one", nargs=3, metavar=("CANDIDATE", "MODEL", "TINY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(peak_of(*arguments.one)))
        return
    with TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        tiny = tiny_model("llama-tied", folder)
        for model in (SMALL, LARGE) if arguments.model is None else (arguments.model,):
            where = "builtin:smollm2"
            if model == LARGE and not (folder / "billion").exists():
                write_random("Llama", BILLION, folder / "billion", tiny, dtype="bfloat16")
            if model == LARGE:
                where = str(folder / "billion")
            for name in arguments.candidates or all_here():
                keep(model, name, measured(name, where, tiny))


def all_here() -> Iterator[str]:
    """The presets of every backend that runs here and quantizes while it loads, by the kernels that there are."""
    for info in polyquant.backends():
        backend = polyquant.backend(info.name)
        if not info.capabilities.on_the_fly or not info.capabilities.runs_on_torch or backend.problems("cpu"):
            continue
        for candidate in presets_of(info):
            yield from (
                (f"{candidate.name},kernel={kernel}" for kernel in ("packed", "library"))
                if backend.can("pack")
                else (candidate.name,)
            )


def measured(name: str, model: str, tiny: Path) -> dict[str, Any]:
    """What one load takes in a process of its own, or why it failed."""
    command = [sys.executable, __file__, "--one", name, model, str(tiny)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        return {"failed": (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]}
    return json.loads(ended.stdout.splitlines()[-1])


def peak_of(name: str, model: str, tiny: str) -> dict[str, Any]:
    """Bytes that are kept, added at the peak and planned, of one load in this process."""
    from polyquant.memory.storage import stored_bytes

    candidate = parse(name, lambda backend: polyquant.backend(backend).info)
    options: dict[str, Any] = {**candidate.options, "device": "cpu"}
    plan = polyquant.plan(model, candidate.backend, **options)
    polyquant.load(tiny, candidate.backend, **options)  # its library is imported, and kernels are there
    start, before = time.perf_counter(), own_bytes()
    with sampled(own_bytes) as samples:
        loaded = polyquant.load(model, candidate.backend, cache=False, **options)
    return {
        "kept_bytes": stored_bytes(loaded.model),
        "added_bytes": max(samples) - before,
        "planned_bytes": plan.load_peak_bytes - plan.process_bytes,
        "seconds": round(time.perf_counter() - start, 1),
    }


def own_bytes() -> int:
    """Resident memory of this process that is no file's: a system may take pages of files back at any time."""
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * resource.getpagesize()


@contextmanager
def sampled(value: Callable[[], int]) -> Iterator[list[int]]:
    """Within it a value is read all the time."""
    samples, done = [value()], Event()

    def work() -> None:
        while not done.wait(SAMPLED_SECONDS):
            samples.append(value())

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def keep(model: str, name: str, figures: dict[str, Any]) -> None:
    """Put a row into the file, and show it."""
    everything = json.loads(PEAKS.read_text(encoding="utf-8")) if PEAKS.exists() else {}
    everything.setdefault(model, {})[name] = figures
    PEAKS.write_bytes(msgspec.json.format(msgspec.json.encode(everything), indent=1) + b"\n")
    if "failed" in figures:
        print(f"{model}  {name}: {figures['failed']}", flush=True)
        return
    kept, added, planned = (figures[part] for part in ("kept_bytes", "added_bytes", "planned_bytes"))
    ratios = f"{added / kept:.2f} x kept, plan {planned / added - 1:+.0%}"
    print(
        f"{model}  {name}: kept {kept / 1e6:.1f}, added {added / 1e6:.1f}, planned {planned / 1e6:.1f}: {ratios}",
        flush=True,
    )


if __name__ == "__main__":
    main()
