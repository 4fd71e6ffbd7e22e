"""Measures one cell: its checkpoint first where it needs one, then the model, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event

import msgspec

from polyquant.comparison import environments
from polyquant.comparison.cell.checkpoint import Making
from polyquant.comparison.records import Job, Result
from polyquant.support.files import locked, write_atomically
from polyquant.support.processes import account, run_logged
from polyquant.types import Record

MADE = "seconds.json"  # beside a made checkpoint: what making it took


class Task(Record, frozen=True):
    """A cell to measure."""

    key: str
    job: Job
    making: Making | None = None
    limit_seconds: float = 3600


def measure(
    task: Task,
    work: Path,
    tell: Callable[[str], None],
    *,
    stop: Event | None = None,
    environment: Mapping[str, str] | None = None,
) -> Result:
    """The result of a cell, whatever happens to its processes.

    work: folder for the files of processes that run; what a failed one printed stays there as KEY.log.
    """
    work.mkdir(parents=True, exist_ok=True)
    job_path, result_path, log = (work / f"{task.key}.{end}" for end in ("job.json", "result.json", "log"))
    seconds = None
    if task.making is not None:
        seconds, reason = _make(task, task.making, work, tell, stop, environment)
        if reason:
            return Result(job=task.job, status="failed", reason=reason)
    away = environments.where(task.job.backend)
    write_atomically(job_path, environments.portable(task.job, away).to_json())
    result_path.unlink(missing_ok=True)
    ended = run_logged(
        "polyquant.comparison.cell.run", [str(job_path), str(result_path)], log, limit_seconds=task.limit_seconds,
        tell=tell, stop=stop, **environments.process(away, environment),
    )  # fmt: skip
    job_path.unlink(missing_ok=True)
    if ended.code == 0 and result_path.exists():
        result = msgspec.json.decode(result_path.read_bytes(), type=Result)
        result_path.unlink()
        if result.status == "done":
            log.unlink(missing_ok=True)
        return msgspec.structs.replace(result, job=task.job, seconds=ended.seconds, quantize_seconds=seconds)
    reason = account(ended, task.limit_seconds)
    return Result(job=task.job, status="failed", reason=reason, seconds=ended.seconds, quantize_seconds=seconds)


def _make(
    task: Task, making: Making, work: Path, tell: Callable[[str], None], stop: Event | None,
    environment: Mapping[str, str] | None,
) -> tuple[float | None, str]:  # fmt: skip
    """Seconds that making the checkpoint took, once, and why it failed, if it did."""
    out = Path(making.out)
    took = out.with_name(f"{out.name}.{MADE}")
    with locked(out):
        if not (out.is_dir() and took.exists()):
            job_path, log = work / f"{task.key}.making.json", work / f"{task.key}.making.log"
            away = environments.where(making.backend)
            write_atomically(job_path, environments.portable(making, away).to_json())
            ended = run_logged(
                "polyquant.comparison.cell.checkpoint", [str(job_path)], log, limit_seconds=task.limit_seconds, tell=tell,
                stop=stop, **environments.process(away, environment),
            )  # fmt: skip
            job_path.unlink(missing_ok=True)
            if ended.code != 0:
                return None, f"quantizing: {account(ended, task.limit_seconds)}"
            log.unlink(missing_ok=True)
            write_atomically(took, f"{ended.seconds:.3f}\n")
        return float(took.read_text()), ""
