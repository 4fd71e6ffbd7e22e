"""The step `conformance:BACKEND`: what the backend declares, run on the device with tiny models.

Checks of cards and options are left out: no device changes them. A rehearsal leaves out more, and packs GPTQ and AWQ by
rounding instead of calibrating.
"""

from __future__ import annotations

import re
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from sys import stderr
from typing import Any

import checkpoint
import common

SAME_EVERYWHERE = ("card", "options")  # groups of checks


def measure(arguments: common.Facts, note: common.Note) -> None:
    from polyquant.authoring.check import checked
    from polyquant.testing.running import expected_reason, planned, run_check

    backend, small = arguments["backend"], arguments["small"]
    folder = Path(arguments["work"]) / f"conformance-{backend}"
    folder.mkdir(parents=True, exist_ok=True)
    subject, known = checked(backend, folder, device=arguments["device"], tests=tests_of(backend))
    first = next(iter(subject.info.presets), "")
    if small and backend in checkpoint.STORED:
        group = dict(subject.info.presets[first])["group_size"]
        subject.make_checkpoint = lambda dense, preset, out: checkpoint.pack(backend, dense, out, "cpu", group)
    runs = planned(subject, models=("llama",) if small else None, real=False)
    left_out = (*SAME_EVERYWHERE, "state") if small else SAME_EVERYWHERE
    runs = [
        (check, case) for check, case in runs if check.group not in left_out and (not small or case.preset == first)
    ]
    if not subject.capabilities.on_the_fly:
        require_checkpoints(subject, first)
    counted: Counter[str] = Counter()
    failures = []
    for number, (check, case) in enumerate(runs, start=1):
        note({"at": f"{number}/{len(runs)} {check.name} {case}"})
        with redirect_stdout(stderr):
            outcome = run_check(check, subject, case)
        status, reason = outcome.status, expected_reason(known, check, case)
        if status == "failed" and reason:
            status = "failed as expected"
        elif status == "failed":
            failures.append({"check": outcome.check, "case": outcome.case, "reason": outcome.reason[:600]})
        counted[status] += 1
        note({"counts": dict(counted), "failures": failures, "runs": len(runs)})


def require_checkpoints(subject: Any, preset: str) -> None:
    """Raises NotRun where what makes the backend's checkpoints is not here: nothing can be said of it then."""
    from polyquant.errors import EnvironmentProblem

    try:
        subject.source(preset, "llama")
    except EnvironmentProblem as error:
        raise common.NotRun(f"its checkpoints cannot be made here: {' '.join(str(error).split())}") from error


def tests_of(backend: str) -> Path | None:
    """The file with the backend's conformance class: what it promises, and how its checkpoints are made."""
    named = re.compile(rf"^\s+backend = [\"']{re.escape(backend)}[\"']$", re.MULTILINE)
    for path in sorted((common.ROOT / "plugins").glob("*/tests/test_conformance*.py")):
        if named.search(path.read_text(encoding="utf-8")):
            return path
    return None


if __name__ == "__main__":
    common.step(measure)
