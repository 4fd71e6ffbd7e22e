"""The records of planning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from polyquant.comparison.candidates import Candidate
from polyquant.options import NumberFormat, RoundingMethod
from polyquant.request import KvCache
from polyquant.support.shown import Look, Looked
from polyquant.support.sizes import size
from polyquant.types import DeviceMap, LayerPlan, Record

SHOWN = 8  # choices that people are shown
Status = Literal["fits", "too big", "does not run", "not planned", "left out"]


class PlannedTensor(LayerPlan, frozen=True):
    """What a tensor is going to be, and what it is now."""

    dtype: str = ""  # in the checkpoint, or as its config has it
    constant_bytes: int = 0  # part of stored_bytes: scales, zero points, absmax, code books, and padding


class Foreseen(Record, frozen=True):
    """The speed that a stand-in for a model had on this machine; None with the reason."""

    prompt_tokens_per_second: float | None = None  # of 512 tokens
    generated_tokens_per_second: float | None = None
    why: str = ""  # it is not foreseen


class Placed(Record, frozen=True):
    """One device of a plan."""

    device: str
    room_bytes: int
    weights_bytes: int  # planned, of the modules that go there
    modules: tuple[str, ...]


class Plan(Looked, Record, frozen=True):
    """What a model takes with a backend, before anything of its weights is read; docs/explanation/memory.md."""

    model: str
    backend: str
    options: Mapping[str, Any]  # the effective ones
    route: str  # as stored, on the fly, dense first, make first: polyquant.loading.settle
    device: str
    compute_dtype: str
    context: int  # tokens
    batch: int
    tensors: tuple[PlannedTensor, ...]
    weights_planned_bytes: int
    weights_dense_bytes: int  # the same weights in bfloat16
    quantized_bytes: int  # part of weights_planned_bytes, constants included
    constant_bytes: int  # part of quantized_bytes
    bits_per_weight: float  # of the quantized tensors, constants included
    weight_bits: float  # nominal, of most quantized weights; 16 where there are none
    level_bits: float  # of them, what decides how exact a weight is: 4 for int4 that is kept in bytes
    rounding_method: RoundingMethod  # how weights become codes, as the options declare it
    number_format: NumberFormat  # what the codes stand for, as the options declare it
    measured_kl: float | None  # the card's, where the options are those of a preset; nats, on the authors' model
    kv_cache_bytes: int | None  # None: the model's forward pass cannot be followed without weights
    activation_bytes: int | None  # of a prefill of the whole context
    checkpoint_bytes: int  # the weight files as they are now; 0 where only a config is there
    process_bytes: int  # Python, torch and libraries; 0 on a GPU
    load_peak_bytes: int
    run_peak_bytes: int
    reclaimable_bytes: int  # part of load_peak_bytes: mapped pages of weight files, which the system can take back
    needed_bytes: int  # what must be free: the larger of the two peaks, without such pages
    memory_bytes: int  # the budget
    device_map: DeviceMap
    placed: tuple[Placed, ...] = ()
    spilled: tuple[str, ...] = ()  # modules that do not fit the device asked for
    notes: tuple[str, ...] = ()
    kv_cache: KvCache = "keep"  # how keys and values are kept
    foreseen: Foreseen | None = None  # None: not asked for
    on_disk: tuple[str, ...] = ()  # with offload="disk": blocks whose packed weights are read for each token
    read_bytes_per_token: int = 0  # of them; of a mixture's experts those that a token is routed to
    disk_bytes_per_second: float | None = None  # as it was measured; None: it is not needed, or could not be

    @property
    def disk_tokens_per_second(self) -> float | None:
        """What reading blocks comes to by the disk's rate alone; None where none are read, or that is not known."""
        if not self.read_bytes_per_token or self.disk_bytes_per_second is None:
            return None
        return self.disk_bytes_per_second / self.read_bytes_per_token

    @property
    def ratio(self) -> float:
        """Whole model: planned bytes over the same in bfloat16."""
        return self.weights_planned_bytes / self.weights_dense_bytes

    @property
    def fits(self) -> bool:
        """Whether the budget suffices."""
        return self.needed_bytes <= self.memory_bytes

    def look(self) -> Look:
        what = f"{self.model} with {self.backend} on {self.device}, {self.compute_dtype}"
        fits = "fits" if self.fits and not self.spilled else "does not fit"
        return Look(
            f"{what}: {size(self.weights_planned_bytes)} of weights, {self.ratio:.2f}x bfloat16; needs "
            f"{size(self.needed_bytes)} of {size(self.memory_bytes)}: {fits}",
            notes=self.notes,
        )


class PlannedRow(Record, frozen=True):
    """One candidate of a table."""

    candidate: Candidate
    status: Status
    reason: str = ""  # why it is not `fits`, or what comes before it; one sentence
    fix: str = ""  # the command that changes it
    plan: Plan | None = None


class Absent(Record, frozen=True):
    """A backend that is not installed."""

    backend: str
    command: str


class Plans(Looked, Record, frozen=True):
    """Every installed backend's presets on one model: what fits comes first, the least lossy before it."""

    model: str
    device: str
    memory_bytes: int
    rows: tuple[PlannedRow, ...]
    absent: tuple[Absent, ...]
    notes: tuple[str, ...] = ()

    @property
    def fitting(self) -> list[PlannedRow]:
        """The candidates that fit and run here."""
        return [row for row in self.rows if row.status == "fits"]

    @property
    def nearest(self) -> PlannedRow | None:
        """Of what runs here, the candidate that needs least."""
        planned = [row for row in self.rows if row.plan is not None and row.status in ("fits", "too big")]
        return min(planned, key=lambda row: row.plan.needed_bytes if row.plan else 0, default=None)

    def look(self) -> Look:
        rows = [
            (row.candidate.name, row.status, *_figures(row.plan), "" if row.status == "fits" else row.reason)
            for row in self.rows
        ]
        return Look(
            f"{self.model} on {self.device}: {len(self.fitting)} of {len(rows)} fit {size(self.memory_bytes)}",
            ("candidate", "", "weights", "of bfloat16", "needed", "why not"), rows, self.notes,
        )  # fmt: skip


def _figures(plan: Plan | None) -> tuple[str, str, str]:
    if plan is None:
        return ("", "", "")
    return (size(plan.weights_planned_bytes), f"{plan.ratio:.2f}x", size(plan.needed_bytes))


class Choice(Record, frozen=True):
    """A candidate in the order of a recommendation."""

    candidate: Candidate
    reason: str  # what put it where it is: the figure and where it is from
    measured: bool
    needed_bytes: int
    command: str  # loads it


class Recommendation(Looked, Record, frozen=True):
    """The candidates that fit, best first, and why the others are out."""

    model: str
    goal: str
    memory_bytes: int
    reason: str  # one sentence: why the first is first
    choices: tuple[Choice, ...]
    excluded: Mapping[str, str]  # candidate or backend -> why
    advice: tuple[str, ...] = ()  # where nothing fits: what would have to give

    @property
    def best(self) -> Choice | None:
        """The first; None where nothing fits."""
        return self.choices[0] if self.choices else None

    def look(self) -> Look:
        rows = [(each.candidate.name, size(each.needed_bytes), each.reason) for each in self.choices[:SHOWN]]
        more = [f"{len(self.choices) - SHOWN} more are in `choices`"] if len(self.choices) > SHOWN else []
        return Look(
            f"{self.model}, goal {self.goal}: {self.reason}", ("candidate", "needs", "why"), rows,
            [*self.advice, *more],
        )  # fmt: skip


def total(tensors: Sequence[LayerPlan]) -> int:
    """Sum of stored bytes."""
    return sum(tensor.stored_bytes for tensor in tensors)
