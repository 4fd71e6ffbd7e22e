"""Observers: pluggy wrappers that see every addressed hook call, whichever backend answers it."""

from __future__ import annotations

from collections.abc import Generator
from time import perf_counter
from typing import Any

from polyquant.contract.markers import hookimpl
from polyquant.memory.peak import Peak, measure_peak
from polyquant.types import HookRecord

Wrapper = Generator[None, Any, Any]


class Recorder:
    """Records wall time and peak memory of each hook call of one backend."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.records: list[HookRecord] = []

    def _observe(self, hook: str) -> Wrapper:
        started, peak, failed = perf_counter(), Peak(), True
        try:
            with measure_peak() as peak:
                result = yield
            failed = False
            return result
        finally:
            self.records.append(
                HookRecord(
                    backend=self.backend,
                    hook=hook,
                    seconds=perf_counter() - started,
                    peak_bytes=peak.peak_bytes,
                    held_bytes=peak.held_bytes,
                    device=peak.device,
                    failed=failed,
                )
            )

    @hookimpl(wrapper=True)
    def load(self) -> Wrapper:
        return (yield from self._observe("load"))

    @hookimpl(wrapper=True)
    def describe_layers(self) -> Wrapper:
        return (yield from self._observe("describe_layers"))

    @hookimpl(wrapper=True)
    def plan_layers(self) -> Wrapper:
        return (yield from self._observe("plan_layers"))

    @hookimpl(wrapper=True)
    def quantize(self) -> Wrapper:
        return (yield from self._observe("quantize"))

    @hookimpl(wrapper=True)
    def prepare_for_training(self) -> Wrapper:
        return (yield from self._observe("prepare_for_training"))

    @hookimpl(wrapper=True)
    def save(self) -> Wrapper:
        return (yield from self._observe("save"))
