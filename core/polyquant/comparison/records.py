"""The JSON between processes and on disk: jobs, what they answered, and a whole comparison. Records alone: what is made
of them is in `result`, `choice` and `report`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from polyquant.comparison.candidates import DENSE, Candidate
from polyquant.loading.records import Check, Memory
from polyquant.measure.behaviour.records import Behaviour
from polyquant.measure.quality.records import Quality
from polyquant.measure.speed import Speed
from polyquant.support.machine import Machine
from polyquant.types import Record

Part = Literal["quality", "speed", "tasks", "behaviour"]
"""What a cell measures after it has loaded and verified the model."""
Goal = Literal["quality", "speed", "memory"]
OTHER_WORK = 0.05
"""Share of its cores that other processes may take while a cell is timed; above, its speeds are marked."""
Status = Literal["done", "check failed", "failed", "missing"]
"""Where a row stands; `check failed` is measured, but not what the backend promised."""


class Job(Record, frozen=True):
    """One candidate on one model."""

    model: str  # as `polyquant.load` takes it
    backend: str
    options: Mapping[str, Any] = {}
    device: str = "auto"
    parts: tuple[Part, ...] = ("speed",)
    reference: str = ""  # folder of the reference's stored log-probabilities and answers
    reference_key: str = ""
    dense: str = ""  # the dense model, for the error of each layer's weights; empty: not measured
    tasks: tuple[str, ...] = ()  # of lm-eval
    task_folder: str = ""  # where tasks of one's own lie
    task_limit: int = 0  # examples of each task at most; 0: all
    speed_limit_seconds: float = 300  # see measure_speed: slow models are repeated less often


class CheckpointJob(Record, frozen=True):
    """A checkpoint to make with a backend that quantizes offline."""

    model: str
    backend: str
    options: Mapping[str, Any]
    device: str
    out: str  # folder


class ReferenceJob(Record, frozen=True):
    """The reference to compute on a text, and where its log-probabilities go."""

    model: str
    text: str
    preset: str
    limit: int | None  # windows of text at most
    candidate: Candidate
    device: str
    folder: str
    key: str
    quality: bool = True  # whether its log-probabilities are wanted
    behaviour: bool = False  # whether its answers to the shipped prompts are


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

    @property
    def column(self) -> str:
        """The column of its value in a report."""
        return f"{self.task}_{self.metric}"


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
    emulated_activations: str = ""  # formats that activations were rounded to in software
    layers: tuple[Layer, ...] = ()
    quality: Quality | None = None
    speed: Speed | None = None
    other_work_share: float | None = None  # of the cores' time, what other processes used meanwhile; None: not known
    scores: tuple[Score, ...] = ()
    behaviour: Behaviour | None = None
    seconds: float = 0.0  # of the processes that measured it, imports included
    own_seconds: float = 0.0  # of these: loading and measuring
    import_seconds: float = 0.0  # of these: until the libraries were there

    @property
    def failed_checks(self) -> list[Check]:
        """The checks of the verification that did not pass."""
        return [check for check in self.checks if not check.passed]

    @property
    def beside_other_work(self) -> bool:
        """Whether its speeds were measured while other processes took more of its cores than OTHER_WORK."""
        return (self.other_work_share or 0.0) > OTHER_WORK

    @property
    def weights_stored_bytes(self) -> int | None:
        """Bytes of the weights, every storage once; None where they were not measured."""
        if self.stored_bytes is None and self.memory is not None:
            return self.memory.weights_stored_bytes
        return self.stored_bytes


class Row(Record, frozen=True):
    """A candidate with its result."""

    candidate: Candidate
    key: str  # hash of all that determines the result; the cell's file name
    command: str  # reproduces this row
    result: Result | None = None  # None: not measured yet

    @property
    def status(self) -> Status:
        """Where it stands."""
        if self.result is None:
            return "missing"
        if self.result.status == "failed":
            return "failed"
        return "check failed" if self.result.failed_checks else "done"

    @property
    def reason(self) -> str:
        """Why it failed, with what its process said last; or the checks that did not pass. Empty where all is well."""
        if self.result is None:
            return "not measured yet"
        checks = (f"{check.name}: {check.found} (expected: {check.expected})" for check in self.result.failed_checks)
        return self.result.reason or "; ".join(checks)


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


class Run(Record, frozen=True):
    """A whole comparison, as its folder holds it in comparison.json."""

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

    def is_reference(self, row: Row) -> bool:
        """Whether a row is what the others are compared with; `dense` and `dense:float32` are the same."""
        full_names = {DENSE: f"{DENSE}:float32"}
        name, reference = row.candidate.name, self.setting.reference
        return full_names.get(name, name) == full_names.get(reference, reference)
