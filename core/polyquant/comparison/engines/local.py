"""Runs cells on this machine: several at a time where only quality is measured, alone where speed is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from threading import Event

from polyquant.comparison.engines.measure import Task, measure
from polyquant.comparison.records import Result
from polyquant.support.machine import this_machine

Tell = Callable[[str, str], None]
"""(key of a cell, what it is doing)."""
Engine = Callable[[Sequence[Task], Path, Tell], Iterator[tuple[Task, Result]]]
"""(tasks, folder for working files, tell) -> each task with its result, as they finish."""


def local(jobs: int) -> Engine:
    """Tasks in threads that wait for their processes, `jobs` at a time; those that measure speed afterwards, alone."""

    def run(tasks: Sequence[Task], work: Path, tell: Tell) -> Iterator[tuple[Task, Result]]:
        alone = [task for task in tasks if jobs == 1 or "speed" in task.job.parts]
        together = [task for task in tasks if task not in alone]
        yield from _run(together, jobs, work, tell)
        yield from _run(alone, 1, work, tell)

    return run


def _run(tasks: Sequence[Task], jobs: int, work: Path, tell: Tell) -> Iterator[tuple[Task, Result]]:
    stop = Event()
    slots: SimpleQueue[Mapping[str, str]] = SimpleQueue()
    for environment in _devices(jobs):
        slots.put(environment)

    def one(task: Task) -> Result:
        environment = slots.get()
        try:
            return measure(task, work, lambda step: tell(task.key, step), stop=stop, environment=environment)
        finally:
            slots.put(environment)

    with ThreadPoolExecutor(jobs) as threads:
        waiting: dict[Future[Result], Task] = {threads.submit(one, task): task for task in tasks}
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
        except BaseException:
            stop.set()
            threads.shutdown(wait=True, cancel_futures=True)
            raise


def _devices(jobs: int) -> list[dict[str, str]]:
    """Environment of each of `jobs` cells at a time: a GPU each, where there are several."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(index) for index in range(len(this_machine().accelerators))]
    if jobs == 1 or len(gpus) < 2:
        return [{} for _ in range(jobs)]
    return [{"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} for slot in range(jobs)]
