"""Runs cells on this machine: several at a time where only quality is measured, alone where speed is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from threading import Event

from polyquant.comparison.engines.measure import CellTask, measure_cell
from polyquant.comparison.records import Result
from polyquant.support.machine import this_machine
from polyquant.support.progress import Progress, ProgressOf


class Local:
    """Cells in threads that wait for their processes, `jobs` at a time; those that measure speed afterwards, alone."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs

    def run(self, tasks: Sequence[CellTask], work: Path, progress: Progress) -> Iterator[tuple[CellTask, Result]]:
        """See `Engine`."""
        alone = [task for task in tasks if self._jobs == 1 or "speed" in task.job.parts]
        together = [task for task in tasks if task not in alone]
        yield from _run(together, self._jobs, work, progress)
        yield from _run(alone, 1, work, progress)


def _run(tasks: Sequence[CellTask], jobs: int, work: Path, progress: Progress) -> Iterator[tuple[CellTask, Result]]:
    stop = Event()
    slots: SimpleQueue[Mapping[str, str]] = SimpleQueue()
    for variables in _devices(jobs):
        slots.put(variables)

    def in_a_slot(task: CellTask) -> Result:
        variables = slots.get()
        try:
            return measure_cell(task, work, ProgressOf(progress, task.key), stop=stop, variables=variables)
        finally:
            slots.put(variables)

    with ThreadPoolExecutor(jobs) as threads:
        waiting: dict[Future[Result], CellTask] = {threads.submit(in_a_slot, task): task for task in tasks}
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
        except BaseException:
            stop.set()
            threads.shutdown(wait=True, cancel_futures=True)
            raise


def _devices(jobs: int) -> list[dict[str, str]]:
    """Environment variables of each of `jobs` cells at a time: a GPU each, where there are several."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(index) for index in range(len(this_machine().accelerators))]
    if jobs == 1 or len(gpus) < 2:
        return [{} for _ in range(jobs)]
    return [{"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} for slot in range(jobs)]
