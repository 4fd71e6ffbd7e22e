"""What a search finds. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyquant.measure.quality.records import Quality
from polyquant.types import Record


class Assigned(Record, frozen=True):
    """The format of layers that were given one together."""

    modules: tuple[str, ...]  # full names
    format: str
    stored_bytes: int
    kl: float  # that it alone causes, on the calibration text, nats a position


class Uniform(Record, frozen=True):
    """The same format for everything that was searched."""

    format: str
    stored_bytes: int  # of the whole model
    fits: bool  # whether that is in the budget
    quality: Quality


class Assignment(Record, frozen=True):
    """The best assignment that was found, measured, and every uniform one."""

    model: str
    backend: str
    memory_bytes: int  # the budget
    stored_bytes: int  # of the whole model, as planned
    kl_predicted: float  # the sum of what each part causes alone, on the calibration text
    quality: Quality  # on other text
    assigned: tuple[Assigned, ...]
    uniform: tuple[Uniform, ...]  # smallest first
    options: Mapping[str, Any]  # of the backend, that come to it
    command: str  # that makes it again
    checkpoint: str = ""  # the folder it was written to
    notes: tuple[str, ...] = ()
