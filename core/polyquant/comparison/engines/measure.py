"""Measures one cell: its checkpoint first where it needs one, then the model, each in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Event

import msgspec

from polyquant.comparison import environments
from polyquant.comparison.records import CheckpointJob, Job, Result
from polyquant.support.files import locked, write_atomically
from polyquant.support.processes import account, run_logged
from polyquant.support.progress import Progress
from polyquant.types import Record

SECONDS = "seconds.json"  # beside a made checkpoint: what making it took


class CellTask(Record, frozen=True):
    """A cell to measure."""

    key: str
    job: Job
    checkpoint: CheckpointJob | None = None  # what its job loads, to be made first
    limit_seconds: float = 3600


def measure_cell(
    task: CellTask,
    work: Path,
    progress: Progress,
    *,
    stop: Event | None = None,
    variables: Mapping[str, str] | None = None,
) -> Result:
    """The result of a cell, whatever happens to its processes.

    work: folder for the files of processes that run; what a failed one printed stays there as KEY.log. stop: set to end
    them early, which raises `processes.Stopped`. variables: of the environment, set for the processes.
    """
    work.mkdir(parents=True, exist_ok=True)
    job_path, result_path, log = (work / f"{task.key}.{end}" for end in ("job.json", "result.json", "log"))
    seconds = None
    if task.checkpoint is not None:
        seconds, reason = _make(task, task.checkpoint, work, progress, stop, variables)
        if reason:
            return Result(job=task.job, status="failed", reason=reason)
    own = environments.of_backend(task.job.backend)
    write_atomically(job_path, environments.portable(task.job, own).to_json())
    result_path.unlink(missing_ok=True)
    ended = run_logged(
        "polyquant.comparison.cell.run", [str(job_path), str(result_path)], log, limit_seconds=task.limit_seconds,
        progress=progress, stop=stop, **environments.process(own, variables),
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
    task: CellTask, job: CheckpointJob, work: Path, progress: Progress, stop: Event | None,
    variables: Mapping[str, str] | None,
) -> tuple[float | None, str]:  # fmt: skip
    """Seconds that making the checkpoint took, once, and why it failed, if it did."""
    out = Path(job.out)
    seconds_path = out.with_name(f"{out.name}.{SECONDS}")
    with locked(out):
        if not (out.is_dir() and seconds_path.exists()):
            job_path, log = work / f"{task.key}.making.json", work / f"{task.key}.making.log"
            own = environments.of_backend(job.backend)
            write_atomically(job_path, environments.portable(job, own).to_json())
            ended = run_logged(
                "polyquant.comparison.cell.checkpoint", [str(job_path)], log, limit_seconds=task.limit_seconds,
                progress=progress, stop=stop, **environments.process(own, variables),
            )  # fmt: skip
            job_path.unlink(missing_ok=True)
            if ended.code != 0:
                return None, f"quantizing: {account(ended, task.limit_seconds)}"
            log.unlink(missing_ok=True)
            write_atomically(seconds_path, f"{ended.seconds:.3f}\n")
        return float(seconds_path.read_text()), ""
