"""Measures the second load of a model, from the cache of quantized weights, against the first: time and memory.

python docs/examples/second_load.py [MODEL [BACKEND ...]]    for example: builtin:smollm2 bitsandbytes:nf4

Without backends, each that quantizes while loading, in the preset that it has first. A load is measured in a process
that has loaded the model before and keeps it, so that no import counts. The goal is a quarter of the first's wall time,
and 1.1 times the bytes that are mapped, above what the process held before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import polyquant
from polyquant.models.resolve import resolve_dense
from polyquant.packable import PackableOptions

LOADS = """
import gc, json, sys, time
import polyquant
from polyquant.loading import entries
from polyquant.memory.peak import measure_peak

def load(**options):
    gc.collect()
    with measure_peak() as peak:
        start, cpu = time.perf_counter(), time.process_time()
        loaded = polyquant.load(sys.argv[1], sys.argv[2], device="cpu", kernel="packed", **options)
        took = time.perf_counter() - start, time.process_time() - cpu
    cached = any("come from the cache" in note for note in loaded.notes)
    return loaded, (*took, (peak.peak_bytes or 0) - (peak.held_bytes or 0), cached)

options = json.loads(sys.argv[3])
kept, _ = load(**options)
_, took = load(**options)
print(json.dumps([*took, sum(each.entry.stored_bytes for each in entries.kept())]))
"""


def main() -> None:
    model, *backends = sys.argv[1:] or ["builtin:smollm2"]
    backends = backends or [
        f"{info.name}:{next(iter(info.presets))}"
        for info in polyquant.backends(on_the_fly=True, device="cpu")
        if issubclass(info.options, PackableOptions) and info.isolated is None
    ]
    folder = str(resolve_dense(model).path)
    titles = ("first, s", "second, s", "ratio", "CPU, s", "CPU, s", "ratio", "mapped, MB", "peak, MB", "ratio")
    print(f"{'backend':<24}" + "".join(f"{title:>11}" for title in titles), flush=True)
    for backend in backends:
        with tempfile.TemporaryDirectory() as cache:
            made = measured(folder, backend, cache)  # the entry
            second = made and measured(folder, backend, cache)
            first = second and measured(folder, backend, cache, cache=False)
        if not second or not second[3] or not first:
            print(f"{backend:<24}not kept: part of it has no place in the packed layout, or it cannot run", flush=True)
            continue
        (wall, cpu, *_), (again, cpu_again, peak, _, mapped) = first, second
        figures = (wall, again, again / wall, cpu, cpu_again, cpu_again / cpu, mapped / 1e6, peak / 1e6, peak / mapped)
        print(f"{backend:<24}" + "".join(f"{figure:>11.2f}" for figure in figures), flush=True)


def measured(folder: str, backend: str, kept_in: str, **options: Any) -> list[Any]:
    """Seconds, the CPU's, peak bytes, whether it came from the cache, bytes of that; nothing where it fails."""
    command = [sys.executable, "-c", LOADS, folder, backend, json.dumps(options)]
    environment = {**os.environ, "POLYQUANT_CACHE": kept_in}
    ran = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    found: list[Any] = json.loads(ran.stdout.splitlines()[-1]) if ran.returncode == 0 else []
    return found


if __name__ == "__main__":
    main()
