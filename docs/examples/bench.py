"""Benchmarks that compare two commands within one run, alternately: `nox -s bench`. Quote medians and ratios.

1. `polyquant backends` as a whole process, against a bare interpreter.
2. Loading through polyquant, against calling transformers directly with the same config.
3. Planning a model of 70 billion parameters, and one of 671 billion with experts, from their configs.
4. Cells of a comparison: memory over loading, cost for each token of text, and what the cells do not need themselves.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import polyquant
import psutil
from polyquant.comparison.cell.reference import dense_reference
from polyquant.models.resolve import resolve_dense
from polyquant.support.texts import evaluation_text

RUNS = 5
VOCABULARY = 49152  # of SmolLM2
TIMED = """
import json, resource, sys, time
{imports}
started = time.perf_counter()
{load}
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({{"seconds": seconds, "peak_bytes": peak}}))
"""
IMPORTS = "import bitsandbytes, torch, transformers; from transformers import AutoModelForCausalLM, AutoTokenizer"
THROUGH = """
loaded = polyquant.load({model!r}, backend="bitsandbytes", device="cpu", quant_type="nf4", compute_dtype="float32")
"""
DIRECT = """
config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
model = AutoModelForCausalLM.from_pretrained(
    {model!r}, quantization_config=config, device_map={{"": "cpu"}}, dtype=torch.float32,
    trust_remote_code=False,
).eval()
tokenizer = AutoTokenizer.from_pretrained({model!r}, trust_remote_code=False)
"""

LOADED = """
import json, polyquant
from polyquant.memory.peak import measure_peak
with measure_peak() as peak:
    polyquant.load("builtin:smollm2", backend="bitsandbytes", device="cpu", quant_type="nf4")
print(json.dumps(dict(peak_bytes=peak.peak_bytes)))
"""
QUALITY = """
import json, time
from polyquant.comparison.cell.run import run
from polyquant.comparison.records import Job
from polyquant.memory.peak import measure_peak
job = Job(model="builtin:smollm2", backend="bitsandbytes", options=dict(quant_type="nf4"), device="cpu",
          parts=("quality",), reference={folder!r}, reference_key={key!r})
told = []
with measure_peak() as peak:
    result = run(job, lambda step: told.append(time.perf_counter()))
assert result.status == "done", result.reason
print(json.dumps(dict(seconds=told[-1] - told[1], peak_bytes=peak.peak_bytes)))
"""
PLAN = """
import json, time, polyquant
polyquant.plan({warm!r}, "bitsandbytes", memory="1TiB")
started = time.perf_counter()
polyquant.plan({config!r}, "bitsandbytes", memory="1TiB")
print(json.dumps(dict(seconds=time.perf_counter() - started)))
"""
CANDIDATES = ["dense:float32", "bitsandbytes:nf4", "bitsandbytes:int8", "torchao:int8", "quanto:int8", "gguf:Q8_0"]


def main() -> None:
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} threads, Python {platform.python_version()}")
    print(f"load before: {psutil.getloadavg()[0]:.2f}")
    listing()
    loading()
    planning()
    cell_memory()
    cell_overhead()


def listing() -> None:
    """Whole processes; the aim is at most 3x a bare interpreter plus 150 ms."""
    bare, ours = [], []
    for _ in range(2 * RUNS + 1):
        bare.append(wall([sys.executable, "-c", "pass"]))
        ours.append(wall([sys.executable, "-m", "polyquant", "backends"]))
    base, median = statistics.median(bare[1:]), statistics.median(ours[1:])
    limit = 3 * base + 0.150
    figures = f"{median * 1000:.0f} ms, bare {base * 1000:.0f} ms, limit {limit * 1000:.0f} ms"
    print(f"polyquant backends: {figures}: {verdict(median <= limit)}")


def loading() -> None:
    """Each load in a process of its own; the aim is 1.05 for the time and 1.02 for the peak."""
    model = str(resolve_dense("builtin:smollm2").path)
    through = TIMED.format(imports=f"{IMPORTS}\nimport polyquant", load=THROUGH.format(model=model))
    direct = TIMED.format(imports=IMPORTS, load=DIRECT.format(model=model))
    results: dict[str, list[dict[str, float]]] = {"through": [], "direct": []}
    for _ in range(RUNS + 1):
        results["through"].append(measured(through))
        results["direct"].append(measured(direct))
    for figure, limit in (("seconds", 1.05), ("peak_bytes", 1.02)):
        ours, theirs = (statistics.median(run[figure] for run in runs[1:]) for runs in results.values())
        ratio = ours / theirs
        figures = f"polyquant {ours:.4g}, direct {theirs:.4g}, ratio {ratio:.3f}, limit {limit}"
        print(f"NF4 load, {figure}: {figures}: {verdict(ratio <= limit)}")


def planning() -> None:
    """Beyond imports; the aim is 5 and 15 seconds."""
    configs = Path(__file__).parent.parent.parent / "tests" / "configs"
    for name, limit in (("llama-3-70b", 5), ("deepseek-v3", 15)):
        code = PLAN.format(warm=str(configs / "qwen2.5-0.5b.json"), config=str(configs / f"{name}.json"))
        seconds = measured(code)["seconds"]
        print(f"plan of {name}: {seconds:.1f} s, limit {limit} s: {verdict(seconds <= limit)}")


def cell_memory() -> None:
    """Quality on 2, 8 and 32 windows of 512; the aim is 1.15 of a load's peak and one window of float32 logits."""
    load_peak = measured(LOADED)["peak_bytes"]
    limit = 1.15 * load_peak + 512 * VOCABULARY * 4
    for windows in (2, 8, 32):
        folder, key = dense_reference(resolve_dense("builtin:smollm2"), evaluation_text(), limit=windows)
        cell = measured(QUALITY.format(folder=str(folder), key=key))
        figures = (
            f"load peak {load_peak / 2**20:.0f} MiB, of the cell {cell['peak_bytes'] / 2**20:.0f} MiB, "
            f"limit {limit / 2**20:.0f} MiB, {cell['seconds']:.1f} s, {cell['seconds'] / windows:.2f} s a window"
        )
        print(f"NF4 cell, {windows * 512} tokens: {figures}: {verdict(cell['peak_bytes'] <= limit)}")


def cell_overhead() -> None:
    """Six candidates; the aim is at most 5 % beside imports and the cells' own loading and measuring."""
    settings: dict[str, Any] = {"device": "cpu", "windows": 2, "speed_limit_seconds": 4.0}
    with tempfile.TemporaryDirectory() as folder:
        polyquant.compare("builtin:smollm2", CANDIDATES[:1], out=Path(folder) / "reference", **settings)
        started = time.perf_counter()
        comparison = polyquant.compare("builtin:smollm2", CANDIDATES, out=Path(folder) / "cells", **settings)
        took = time.perf_counter() - started
    own = sum(row.result.own_seconds + row.result.import_seconds for row in comparison.rows if row.result)
    share = 1 - own / took
    figures = f"{took:.1f} s, cells and imports {own:.1f} s, the rest {share:.1%}, limit 5 %"
    print(f"{len(comparison.rows)} candidates: {figures}: {verdict(share <= 0.05)}")


def wall(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def measured(code: str) -> dict[str, float]:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.home())
    return dict(json.loads(result.stdout.splitlines()[-1]))


def verdict(good: bool) -> str:
    return "within" if good else "ABOVE"


if __name__ == "__main__":
    main()
