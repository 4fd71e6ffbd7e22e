"""The records of a verification."""

from __future__ import annotations

from collections.abc import Sequence

from polyquant.support.shown import Look, Looked
from polyquant.support.sizes import size
from polyquant.types import LayerInfo, LayerPlan, Record

DENSE_ROLES = ("embedding", "head", "convolution", "custom", "vector", "buffer", "adapter", "tower")
"""Roles that no backend is expected to quantize; the head may be."""


class Check(Record, frozen=True):
    """One thing verified."""

    name: str
    passed: bool
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.name}: expected {self.expected}, found {self.found}"


class Memory(Record, frozen=True):
    """Bytes of a loaded model, each under its own name; docs/explanation/memory.md defines them."""

    weights_planned_bytes: int | None  # predicted from shapes; None: the backend does not plan
    weights_stored_bytes: int  # every storage once
    weights_reported_bytes: int | None  # transformers' get_memory_footprint
    weights_after_forward_bytes: int
    weights_bfloat16_bytes: int  # the same weights, dense, in bfloat16
    quantized_bytes: int  # stored bytes of the quantized tensors
    quantized_planned_bytes: int | None
    quantized_reported_bytes: int | None  # what transformers counts of them: parameters only
    quantized_weights: int  # how many weights those hold
    checkpoint_bytes: int
    load_peak_bytes: int | None
    run_peak_bytes: int | None
    kv_cache_bytes_per_token: int | None
    load_peak_planned_bytes: int | None = None  # what was held before, and what the load was to add

    @property
    def ratio_to_bfloat16(self) -> float:
        """Whole model: stored bytes over the dense model's in bfloat16."""
        return self.weights_stored_bytes / self.weights_bfloat16_bytes

    @property
    def ratio_to_checkpoint(self) -> float:
        """Whole model: stored bytes over the weight files it was loaded from."""
        return self.weights_stored_bytes / self.checkpoint_bytes

    @property
    def quantized_ratio_to_bfloat16(self) -> float:
        """Quantized tensors alone: stored bytes over the same in bfloat16."""
        return self.quantized_bytes / (2 * self.quantized_weights) if self.quantized_weights else 1.0

    @property
    def quantized_bits_per_weight(self) -> float:
        """Stored bits, constants included, for each quantized weight."""
        return 8 * self.quantized_bytes / self.quantized_weights if self.quantized_weights else 0.0


class Sample(Record, frozen=True):
    """A greedy generation."""

    text: str
    seconds: float
    tokens_per_second: float  # prompt included: a first impression, not a benchmark


class Verification(Looked, Record, frozen=True):
    """What a load gave."""

    model: str
    backend: str
    kernel: str
    compute_dtype: str
    device: str
    checks: list[Check]
    memory: Memory
    layers: list[LayerInfo]
    load_seconds: float
    sample: Sample
    notes: list[str]
    emulated_activations: str = ""  # formats that inputs of layers were rounded to in software; speeds are not theirs

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if not check.passed]

    def look(self) -> Look:
        what = f"{self.model} with {self.backend} ({self.kernel}), {self.compute_dtype} on {self.device}"
        checks = [
            ("pass" if check.passed else "FAIL", check.name, check.found, "" if check.passed else check.expected)
            for check in self.checks
        ]
        return Look(
            f"{what}: {size(self.memory.weights_stored_bytes)}, {self.memory.ratio_to_bfloat16:.2f}x bfloat16, "
            f"{'verified' if self.passed else 'verification failed'}",
            ("", "check", "found", "expected"), checks, self.notes,
        )  # fmt: skip


def total(layers: Sequence[LayerInfo] | Sequence[LayerPlan]) -> int:
    """Sum of stored bytes."""
    return sum(layer.stored_bytes for layer in layers)
