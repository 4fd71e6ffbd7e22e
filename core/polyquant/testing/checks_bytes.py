"""Checks of memory: what is described and planned is what is stored, and it comes back."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

from polyquant.loading import checks
from polyquant.loading.records import total
from polyquant.testing.check import NotApplicable, check, expect
from polyquant.testing.models import ARCHITECTURES
from polyquant.testing.subject import Subject


@check(per="model", models=tuple(ARCHITECTURES), needs=("runs_on_torch",))
def described_bytes_are_stored_bytes(subject: Subject, preset: str, model: str) -> None:
    """The bytes of all layers are those of all storages, found by a walk that does not ask the backend."""
    from polyquant.memory.storage import stored_bytes

    loaded = subject.loaded(preset, model)
    first, at_first = loaded.tried_bytes, subject.stored_at_first(preset, model)
    expect(first == at_first, f"as it was loaded {first} bytes are described, {at_first} are stored")
    layers = loaded.layers
    described, stored = total(layers), stored_bytes(loaded.model)
    expect(described == stored, f"{described} bytes are described, {stored} are stored")
    for layer in layers:
        parts = sum(layer.parts.values())
        expect(parts == layer.stored_bytes, f"{layer.name}: its parts have {parts} bytes, it says {layer.stored_bytes}")


@check(per="model", models=tuple(ARCHITECTURES))
def plan_is_within_one_percent(subject: Subject, preset: str, model: str) -> None:
    """Planned bytes are at most 1 % off the stored ones; what is planned quantized is, with that scheme and bits."""
    if not subject.handle.can("plan_layers"):
        raise NotApplicable(f"{subject.backend} does not plan")
    loaded = subject.loaded(preset, model)
    assert loaded.settled is not None  # every load sets it
    plans = subject.handle.plan_layers(loaded.settled.weights, loaded.config)
    stored, planned = subject.stored_at_first(preset, model), total(plans)
    off = abs(stored - planned) / planned
    expect(off <= checks.PLAN_TOLERANCE, f"{planned} bytes are planned, {stored} stored: {off:.2%} off")
    kinds = {layer.name: (layer.scheme, layer.bits) for layer in loaded.initial_layers if layer.quantized}
    planned_kinds = {plan.name: (plan.scheme, plan.bits) for plan in plans if plan.quantized}
    astray = sorted(kinds.keys() ^ planned_kinds.keys())
    expect(not astray, f"planned otherwise than it is: {', '.join(astray[:5])}")
    other = [
        f"{name} as {planned_kinds[name]}, it is {kind}" for name, kind in kinds.items() if kind != planned_kinds[name]
    ]
    expect(not other, f"planned with another scheme or other bits: {'; '.join(other[:3])}")


@check(needs=("runs_on_torch",))
def memory_comes_back(subject: Subject, preset: str) -> None:
    """A deleted model is gone, with all its tensors, and a second load answers as the first did."""
    first, references = _load_and_let_go(subject, preset)
    alive = [name for name, reference in references if reference() is not None]
    expect(not alive, f"still in memory after the model was deleted: {', '.join(alive[:5])}")
    second, _ = _load_and_let_go(subject, preset)
    expect(bool((first == second).all()), "a second load gives other logits")


def _load_and_let_go(subject: Subject, preset: str) -> tuple[Any, Sequence[tuple[str, weakref.ref[Any]]]]:
    from polyquant.memory import storage

    loaded = subject.load(preset)
    logits = loaded.logits([5, 6, 7])
    references = [("the model", weakref.ref(loaded.model))]
    for name, module in loaded.model.named_modules():
        references += [(f"{name}.{path}", weakref.ref(tensor)) for path, tensor in storage._module_tensors(module)]
    del loaded, module
    gc.collect()
    return logits, references
