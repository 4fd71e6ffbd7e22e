"""The JSON between processes: what a cell is asked for, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from polyquant.machine import Machine
from polyquant.quality.records import Quality
from polyquant.report import Check, Memory
from polyquant.speed import Speed
from polyquant.types import Record


class Job(Record, frozen=True):
    """One candidate on one model."""

    model: str  # as `polyquant.load` takes it
    backend: str
    options: Mapping[str, Any] = {}
    device: str = "auto"
    reference: str = ""  # folder of the reference's stored log-probabilities; empty: quality is not measured
    reference_key: str = ""
    speed: bool = True
    speed_limit_seconds: float = 300  # see measure_speed: slow models are repeated less often


class Result(Record, frozen=True):
    """What was measured; where something failed, why, with what was measured before."""

    job: Job
    status: Literal["done", "failed"]
    reason: str = ""
    machine: Machine | None = None
    kernel: str = ""
    compute_dtype: str = ""
    device: str = ""
    threads: int = 0
    load_seconds: float | None = None
    memory: Memory | None = None
    bits_per_weight: float | None = None  # of the quantized tensors, constants included
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()
    quality: Quality | None = None
    speed: Speed | None = None
