"""Observers: pluggy wrappers that see every addressed hook call, whichever backend answers it, and wherever."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from polyquant.contract import hookspecs
from polyquant.contract.markers import hookimpl
from polyquant.memory.peak import Peak, measure_peak
from polyquant.types import HookRecord

Wrapper = Generator[None, Any, Any]
ADDRESSED = tuple(hook for hook in (*hookspecs.REQUIRED, *hookspecs.OPTIONAL) if hook != "backend_info")
"""The hooks that are called of one backend: all but the card."""


@dataclass
class Call:
    """An addressed hook call that is going on."""

    backend: str
    elsewhere: bool = False  # answered by another process, whose memory is not this one's
    there: HookRecord | None = None  # what that process recorded of it


_current: ContextVar[Call | None] = ContextVar("polyquant_hook_call", default=None)


@contextmanager
def calling(call: Call) -> Iterator[None]:
    """Within the block, observers can tell which call they see."""
    token = _current.set(call)
    try:
        yield
    finally:
        _current.reset(token)


class Recorder:
    """Records wall time and peak memory of each hook call: of one backend, or of all where none is named.

    Of a call that another process answers, the time is what passed here, and the memory is that of the other process.
    """

    def __init__(self, backend: str = "") -> None:
        self.backend = backend
        self.records: list[HookRecord] = []

    def _observe(self, hook: str) -> Wrapper:
        call = _current.get() or Call(self.backend)
        if self.backend not in ("", call.backend):
            return (yield)
        started, peak, failed = perf_counter(), Peak(), True
        try:
            with measure_peak() as peak:
                result = yield
            failed = False
            return result
        finally:
            here = (peak.peak_bytes, peak.held_bytes, peak.device)
            there = (call.there.peak_bytes, call.there.held_bytes, call.there.device) if call.there else None
            peak_bytes, held_bytes, device = there or ((None, None, "") if call.elsewhere else here)
            self._record(HookRecord(
                backend=call.backend, hook=hook, seconds=perf_counter() - started, peak_bytes=peak_bytes,
                held_bytes=held_bytes, device=device, failed=failed,
            ))  # fmt: skip

    def _record(self, record: HookRecord) -> None:
        self.records.append(record)


def _observing(hook: str) -> Any:
    """The wrapper of a hook."""

    def observe(self: Recorder) -> Wrapper:
        return (yield from self._observe(hook))

    observe.__name__ = observe.__qualname__ = hook
    return hookimpl(wrapper=True)(observe)


for _hook in ADDRESSED:
    setattr(Recorder, _hook, _observing(_hook))


class Trace(Recorder):
    """Shows each hook call on standard error when it ends: POLYQUANT_TRACE=1."""

    def _record(self, record: HookRecord) -> None:
        where = f" on {record.device}" if record.device else ""
        failed = ", failed" if record.failed else ""
        line = f"polyquant: {record.backend} {record.hook}: {record.seconds:.3f} s{where}{failed}"
        print(line, file=sys.stderr, flush=True)
