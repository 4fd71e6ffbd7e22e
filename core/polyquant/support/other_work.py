"""What other processes take of this one's cores while something is timed. Imports nothing heavy."""

from __future__ import annotations

from contextlib import suppress
from time import perf_counter
from typing import NamedTuple

import psutil

from polyquant.support.machine import usable_cores

LEAST_SECONDS = 1.0  # below, the system's clock ticks (mostly 10 ms) are too coarse to say anything


class _Reading(NamedTuple):
    """Seconds since some time before."""

    clock: float
    passed: float  # on all cores that this process may use
    busy: float  # of these, what anybody used; on a virtual machine what its host took away too
    own: float  # of these, what this process and its descendants used


class OtherWork:
    """Watches the cores that this process may use, from when it is made."""

    def __init__(self) -> None:
        self._began = _read()

    def share(self, cores: int) -> float | None:
        """CPU time that other processes have used since, over that of `cores` cores; above 1 where they used more.

        None where the system does not say, or too little time has passed.
        """
        began, now = self._began, _read()
        if began is None or now is None or now.clock - began.clock < LEAST_SECONDS:
            return None
        if now.passed - began.passed < (now.clock - began.clock) / 2:  # counters that stand still
            return None
        others = (now.busy - began.busy) - (now.own - began.own)
        return max(0.0, others) / ((now.clock - began.clock) * max(1, cores))


def _read() -> _Reading | None:
    """None where the system does not say."""
    try:
        cores = psutil.cpu_times(percpu=True)
        process = psutil.Process()
        family = [process, *process.children(recursive=True)]
        usable = usable_cores()
        times = [core._asdict() for index, core in enumerate(cores) if index in usable]
    except (psutil.Error, OSError, NotImplementedError):
        return None
    own = 0.0
    for member in family:
        with suppress(psutil.Error):  # it has ended; its parent's times have what it used
            own += sum(member.cpu_times()[:4])  # user and system, its own and that of children which have ended
    # a guest's time is part of the user's; Windows counts interrupts and deferred calls within the system's
    parts = [(sum(known.get(name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal")),
              known.get("idle", 0.0) + known.get("iowait", 0.0)) for known in times]  # fmt: skip
    busy = sum(part[0] for part in parts)
    return _Reading(perf_counter(), busy + sum(part[1] for part in parts), busy, own) if times else None
