"""Measures every installed backend's presets on the real model, each in a process of its own, for the docs' table.

python docs/examples/measure.py [--checkpoints DIR] [BACKEND ...]

The results go to docs/reference/measured.json, beside those of backends that are not measured this time; then
`python docs/generate.py` renews the page. Checkpoints that backends make offline are kept in DIR. Leave the machine
alone meanwhile.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import polyquant
from polyquant.candidates import DENSE
from polyquant.comparison.records import Job, Result
from polyquant.comparison.reference import reference
from polyquant.models.resolve import resolve
from polyquant.texts import evaluation_text
from rich.console import Console

MODEL, WINDOWS = "builtin:smollm2", 4  # 4 windows of llamacpp-512: 1020 positions
MEASURED = Path(__file__).parent.parent / "reference" / "measured.json"
LIMIT_SECONDS = 3600
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backends", nargs="*", help="all that run here where left out; 'dense' is the reference model")
    parser.add_argument("--checkpoints", type=Path, default=Path.home() / ".cache" / "polyquant" / "quantized")
    arguments = parser.parse_args()
    folder, key = reference(resolve(MODEL), evaluation_text(), limit=WINDOWS)
    for name, job in jobs(arguments.backends, arguments.checkpoints, str(folder), key):
        result = measured(job)
        record(name, result)
        quality = f"KL {result.quality.kl_mean:.4f}" if result.quality else "no quality"
        console.print(f"{name}: {result.status}, {quality} {result.reason}")


def jobs(wanted: list[str], checkpoints: Path, folder: str, key: str) -> Iterator[tuple[str, Job]]:
    """Every preset of every backend that runs here, with its name."""
    shared = {"device": "cpu", "reference": folder, "reference_key": key, "speed_limit_seconds": 12}
    for dtype in ("float32", "bfloat16") if not wanted or DENSE in wanted else ():
        options = {"compute_dtype": dtype}
        yield f"{DENSE}:{dtype}", Job(model=MODEL, backend=DENSE, options=options, **shared)
    for info in polyquant.backends():
        if (wanted and info.name not in wanted) or polyquant.backend(info.name).problems("cpu"):
            continue
        for preset, own in info.presets.items():
            name, model, options = f"{info.name}:{preset}", MODEL, dict(own)
            if not info.capabilities.on_the_fly:
                made = checkpoints / f"{info.name}-{preset}"
                if not made.exists() and not quantized(info.name, options, made):
                    console.print(f"{name}: no checkpoint at {made}, and none can be made here")
                    continue
                model, options = str(made), {}
            yield name, Job(model=model, backend=info.name, options=options, **shared)


def quantized(backend: str, options: dict[str, object], out: Path) -> bool:
    """Whether the backend could write a checkpoint of the model."""
    if not polyquant.backend(backend).can("quantize"):
        return False
    console.print(f"quantizing with {backend}: {options}")
    polyquant.quantize(MODEL, backend, out, device="cpu", **options)
    return True


def measured(job: Job) -> Result:
    """The result of a cell; where its process ends without one, its last words."""
    with tempfile.TemporaryDirectory() as folder:
        job_path, result_path = Path(folder) / "job.json", Path(folder) / "result.json"
        job_path.write_text(job.to_json())
        command = [sys.executable, "-m", "polyquant.comparison.cell", str(job_path), str(result_path)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
        if result_path.exists():
            return msgspec.json.decode(result_path.read_bytes(), type=Result)
    return Result(job=job, status="failed", reason=f"exit code {ended.returncode}: {ended.stderr.strip()[-500:]}")


def record(name: str, result: Result) -> None:
    """Put one result into the file, without this machine's paths."""
    everything = msgspec.json.decode(MEASURED.read_bytes()) if MEASURED.exists() else {}
    job = msgspec.structs.replace(result.job, model=MODEL, reference="")
    everything[name] = msgspec.to_builtins(msgspec.structs.replace(result, job=job))
    MEASURED.write_text(msgspec.json.format(msgspec.json.encode(everything), indent=1).decode() + "\n")


if __name__ == "__main__":
    main()
