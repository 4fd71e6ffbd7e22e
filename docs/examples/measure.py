"""Measures every installed backend's presets on the real model, for the docs' table.

python docs/examples/measure.py [--checkpoints DIR] [BACKEND ...]

The results go to docs/reference/measured.json, beside those of backends that are not measured this time; then
`python docs/generate.py` renews the page. DIR may hold checkpoints that were made before, as BACKEND-PRESET; others are
made. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import msgspec
import polyquant
from polyquant.cli.progress import showing_rows
from polyquant.comparison.candidates import DENSE, Candidate, presets_of
from polyquant.comparison.records import Result

MODEL = "builtin:smollm2"
SETTINGS = {"windows": 4, "speed_limit_seconds": 12.0, "device": "cpu", "retry": True}  # 4 windows: 1020 positions
MEASURED = Path(__file__).parent.parent / "reference" / "measured.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backends", nargs="*", help="all that run here where left out; 'dense' is the reference model")
    parser.add_argument("--checkpoints", type=Path, default=Path())
    parser.add_argument("--out", type=Path, help="folder that keeps finished cells")
    arguments = parser.parse_args()
    candidates = list(wanted(arguments.backends, arguments.checkpoints))
    with showing_rows(live=False) as progress:
        comparison = polyquant.compare(MODEL, candidates, out=arguments.out, progress=progress, **SETTINGS)
    everything = msgspec.json.decode(MEASURED.read_bytes()) if MEASURED.exists() else {}
    everything |= {row.candidate.name: plain(row.result) for row in comparison.rows if row.result is not None}
    MEASURED.write_text(msgspec.json.format(msgspec.json.encode(everything), indent=1).decode() + "\n")


def wanted(backends: list[str], checkpoints: Path) -> Iterator[Candidate | str]:
    """Every preset of every backend that runs here, from its checkpoint where there is one."""
    if not backends or DENSE in backends:
        yield from (f"{DENSE}:float32", f"{DENSE}:bfloat16")
    for info in polyquant.backends():
        if (backends and info.name not in backends) or polyquant.backend(info.name).problems("cpu"):
            continue
        for candidate in presets_of(info):
            made = checkpoints / candidate.name.replace(":", "-")
            stored = made.is_dir() and not info.capabilities.on_the_fly
            yield Candidate(name=candidate.name, backend=info.name, model=str(made)) if stored else candidate


def plain(result: Result) -> object:
    """A result without this machine's paths, and without the layers, which no table shows."""
    job = msgspec.structs.replace(result.job, model=MODEL, reference="", dense="")
    return msgspec.to_builtins(msgspec.structs.replace(result, job=job, layers=()))


if __name__ == "__main__":
    main()
