"""The JSON between processes and on disk: what a cell is asked for, what it answers, and a whole comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from polyquant.comparison.candidates import Candidate
from polyquant.loading.records import Check, Memory
from polyquant.measure.quality.records import Quality
from polyquant.measure.speed import Speed
from polyquant.support.machine import Machine
from polyquant.types import Record

Part = Literal["quality", "speed", "tasks"]
"""What a cell measures after it has loaded and verified the model."""
Goal = Literal["quality", "speed", "memory"]


class Job(Record, frozen=True):
    """One candidate on one model."""

    model: str  # as `polyquant.load` takes it
    backend: str
    options: Mapping[str, Any] = {}
    device: str = "auto"
    parts: tuple[Part, ...] = ("speed",)
    reference: str = ""  # folder of the reference's stored log-probabilities, for quality
    reference_key: str = ""
    dense: str = ""  # the dense model, for the error of each layer's weights; empty: not measured
    tasks: tuple[str, ...] = ()  # of lm-eval
    task_folder: str = ""  # where tasks of one's own lie
    task_limit: int = 0  # examples of each task at most; 0: all
    speed_limit_seconds: float = 300  # see measure_speed: slow models are repeated less often


class Layer(Record, frozen=True):
    """One weight-bearing tensor of a candidate."""

    name: str
    shape: tuple[int, ...]
    bits: float  # nominal
    scheme: str
    stored_bytes: int
    quantized: bool
    relative_error: float | None = None  # Frobenius norm of the weights' error over that of the weights


class Score(Record, frozen=True):
    """One metric of a task."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    examples: int


class Result(Record, frozen=True):
    """What was measured; where something failed, why, with what was measured before."""

    job: Job
    status: Literal["done", "failed"]
    reason: str = ""
    parts: tuple[Part, ...] = ()  # those that are measured
    machine: Machine | None = None
    kernel: str = ""
    compute_dtype: str = ""
    device: str = ""
    threads: int = 0
    quantize_seconds: float | None = None  # making the checkpoint, for backends that do it offline
    load_seconds: float | None = None
    stored_bytes: int | None = None  # of the weights, every storage once
    memory: Memory | None = None  # more of it, for what a backend has loaded
    bits_per_weight: float | None = None  # of the quantized tensors, constants included
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()
    layers: tuple[Layer, ...] = ()
    quality: Quality | None = None
    speed: Speed | None = None
    scores: tuple[Score, ...] = ()
    seconds: float = 0.0  # of the processes that measured it, imports included
    own_seconds: float = 0.0  # of these: loading and measuring
    import_seconds: float = 0.0  # of these: until the libraries were there

    @property
    def failed_checks(self) -> list[Check]:
        """The checks of the verification that did not pass."""
        return [check for check in self.checks if not check.passed]


class Row(Record, frozen=True):
    """A candidate with its result."""

    candidate: Candidate
    key: str  # hash of all that determines the result; the cell's file name
    command: str  # reproduces this row
    result: Result | None = None  # None: not measured yet


class Setting(Record, frozen=True):
    """What all candidates of a comparison are measured on."""

    model: str
    model_hash: str  # content of its files
    device: str
    parts: tuple[Part, ...]
    preset: str  # convention of the quality measurement
    text: str  # name of the text
    windows: int  # at most so many; 0: the whole text
    reference: str  # candidate that the others are compared with
    tasks: tuple[str, ...] = ()


class Comparison(Record, frozen=True):
    """A whole comparison: what `polyquant.compare` returns, and what its folder holds as comparison.json."""

    version: str  # of polyquant
    created: str  # ISO 8601, UTC
    folder: str  # where it lies
    command: str  # measures what is missing, or all of it again elsewhere
    setting: Setting
    machine: Machine
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def done(self) -> list[Row]:
        """The rows whose measurement succeeded."""
        return [row for row in self.rows if row.result is not None and row.result.status == "done"]

    def to_pandas(self) -> Any:
        """A pandas DataFrame, one row a candidate, the columns of the CSV file."""
        import pandas as pd

        from polyquant.comparison.report.rows import columns, rows

        return pd.DataFrame(rows(self), columns=columns(self))

    def best(
        self, goal: Goal = "quality", *, memory: int | str | None = None, kl: float | None = None,
        context_tokens: int = 2048,
    ) -> Row:  # fmt: skip
        """The best candidate that was measured; see `polyquant.comparison.choice.best`."""
        from polyquant.comparison.choice import best

        return best(self, goal, memory=memory, kl=kl, context_tokens=context_tokens)

    def report(self, path: str | Path) -> Path:
        """Write the report as one HTML file that works offline, with CSV, JSON and Markdown beside it."""
        from polyquant.comparison.report.page import write_report

        return write_report(self, Path(path))
