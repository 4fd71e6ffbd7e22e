"""Plans against measurement: every installed backend's presets on a model, each in a process of its own.

python docs/examples/plans.py [--model MODEL] [--checkpoints DIR] [BACKEND ...]

Prints a Markdown table of planned against measured stored bytes, load peak and run peak. Presets of backends that
quantize offline need their checkpoints in DIR, as docs/examples/measure.py leaves them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import polyquant
from polyquant.comparison.candidates import parse, presets_of

CONTEXT = 32  # tokens; about what a verification runs
STORED, PEAK = 0.01, 0.10  # what the plan is held to
HEADINGS = ("candidate", "stored: planned", "measured", "off", "load peak: planned", "measured", "off",
            "run peak: planned", "measured", "off")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backends", nargs="*", help="all that run here where left out")
    parser.add_argument("--model", default="builtin:smollm2", help="a dense one")
    parser.add_argument("--checkpoints", type=Path, default=Path.home() / ".cache" / "polyquant" / "quantized")
    parser.add_argument("--one", nargs=2, metavar=("CANDIDATE", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(compared(*arguments.one)))
        return
    print(f"| {' | '.join(HEADINGS)} |\n|{' --- |' * len(HEADINGS)}", flush=True)
    for info in polyquant.backends():
        if arguments.backends and info.name not in arguments.backends:
            continue
        for candidate in presets_of(info):
            made = arguments.checkpoints / candidate.name.replace(":", "-")
            if not info.capabilities.on_the_fly and not made.exists():
                print(f"| {candidate.name} | no checkpoint at {made.name} |", flush=True)
                continue
            own = arguments.model if info.capabilities.on_the_fly else str(made)
            command = [sys.executable, __file__, "--one", candidate.name, own]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            last = (ended.stderr.strip().splitlines() or ["no reason given"])[-1]
            print(row(candidate.name, json.loads(ended.stdout)) if ended.returncode == 0 else
                  f"| {candidate.name} | {last} |", flush=True)  # fmt: skip


def compared(name: str, model: str) -> list[tuple[int, int]]:
    """(planned, measured) of stored bytes, load peak and run peak, planned and measured in this process."""
    candidate = parse(name, lambda backend: polyquant.backend(backend).info)
    on_the_fly = polyquant.backend(candidate.backend).info.capabilities.on_the_fly
    options: dict[str, object] = dict(candidate.options) if on_the_fly else {}
    if hasattr(polyquant.backend(candidate.backend).config({}), "n_ctx"):
        options["n_ctx"] = CONTEXT  # it makes room for its whole context while it loads: the one that is planned
    planned = polyquant.plan(model, candidate.backend, device="cpu", context=CONTEXT, **options)
    report = polyquant.verify(polyquant.load(model, candidate.backend, device="cpu", **options))
    memory = report.memory
    return [
        (planned.weights_planned_bytes, memory.weights_stored_bytes),
        (planned.load_peak_bytes, memory.load_peak_bytes or 0),
        (planned.run_peak_bytes, memory.run_peak_bytes or 0),
    ]


def row(name: str, pairs: list[tuple[int, int]]) -> str:
    """A line of the table, in MB; what is further off than it is held to is bold."""
    cells = []
    for (planned, measured), held_to in zip(pairs, (STORED, PEAK, PEAK), strict=True):
        off = f"{measured / planned - 1:+.2%}" if held_to == STORED else f"{measured / planned - 1:+.0%}"
        far = abs(measured / planned - 1) > held_to
        cells += [f"{planned / 1e6:.1f}", f"{measured / 1e6:.1f}", f"**{off}**" if far else off]
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
