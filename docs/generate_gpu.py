"""What a run of docs/examples/gpu.py says of the backends, for the column "verified on"."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = 1
SHOWN = ("torch", "transformers")


class GpuRun(NamedTuple):
    """One machine, and what its run found of each backend."""

    kind: str  # torch's device type
    conditions: str  # device, driver, versions and date, in a sentence
    verified: frozenset[str]  # backends whose checks all passed there
    reasons: dict[str, str]  # backend -> why it is not among them


def read_gpu_run(path: Path) -> GpuRun | None:
    """The run whose gpu.json lies there; None where there is none. Ends the process for one that proves nothing."""
    if not path.exists():
        return None
    results = json.loads(path.read_text(encoding="utf-8"))
    if results.get("schema") != SCHEMA:
        sys.exit(
            f"{path.name} has schema {results.get('schema')}, and {SCHEMA} is read: run docs/examples/gpu.py again"
        )
    if results["asked"]["small"]:
        sys.exit(f"{path.name} is a rehearsal (--small), which verifies nothing: run docs/examples/gpu.py without it")
    if "diagnoses" not in results:
        why = "; ".join(row["reason"] for row in results["steps"]) or "it was cut off"
        sys.exit(f"{path.name} is of a run that ended before any backend was looked at: {why}")
    ended = {row["arguments"]["backend"]: row for row in results["steps"] if row["kind"] == "conformance"}
    reasons = {backend: reason for backend, row in ended.items() if (reason := why_not(row))}
    for diagnosis in results["diagnoses"]:
        if diagnosis["backend"] not in ended:
            problems = "; ".join(problem["what"] for problem in diagnosis["problems"])
            reasons[diagnosis["backend"]] = problems or "not reached"
    return GpuRun(results["device"]["kind"], conditions(results), frozenset(ended) - frozenset(reasons), reasons)


def why_not(row: dict[str, Any]) -> str:
    """Why a conformance step does not verify its backend; empty where it does."""
    if row["status"] != "done":
        return str(row["reason"])
    counts = row["facts"].get("counts", {})  # none where no check was planned
    if counts.get("failed"):
        return f"{counts['failed']} of {row['facts']['runs']} checks fail"
    return "" if counts.get("passed") else "no check applied"


def conditions(results: dict[str, Any]) -> str:
    """Such as: cuda: NVIDIA H100, driver 580.1, CUDA 13.0, Python 3.12.3, torch 2.11.0, 2026-11-27."""
    device, versions = results["device"], results["versions"]
    driver = [f"driver {device['driver']}"] if device.get("driver") else []
    toolkit = [f"CUDA {device['cuda']}"] if device.get("cuda") else []
    named = [f"{name} {versions[name]}" for name in SHOWN if name in versions]
    python, date = f"Python {results['machine']['python']}", results["date"].partition("T")[0]
    return f"{device['kind']}: {', '.join([device['name'], *driver, *toolkit, python, *named, date])}."
