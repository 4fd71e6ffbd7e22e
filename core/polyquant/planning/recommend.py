"""The best candidate for a model, a budget and a goal, with the reason; and why each other one is out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec

from polyquant.comparison.choice import require_goal
from polyquant.comparison.records import Goal
from polyquant.comparison.store import comparisons_folder
from polyquant.errors import ConfigError, did_you_mean
from polyquant.isolated import handles
from polyquant.planning.devices import read_budget
from polyquant.planning.measured import Measured, measured_here
from polyquant.planning.model import PlannedModel
from polyquant.planning.plan import Asked
from polyquant.planning.records import Choice, PlannedRow, Plans, Recommendation
from polyquant.planning.scale import standing
from polyquant.planning.table import load_command, plan_all
from polyquant.support.sizes import size
from polyquant.types import Capabilities

ABILITIES = tuple(
    field.name for field in msgspec.structs.fields(Capabilities) if field.type is bool or field.type == "bool"
)
FIGURES = {
    "quality": "KL {:.4f} nats to the dense model",
    "speed": "{:.1f} generated tokens a second",
    "memory": "{}",
}
FORESEEN = "foreseen here, on a stand-in with random weights: "


def recommend(
    model: str | Path, goal: Goal, needs: Collection[str], asked: Asked, memory: int | str | None,
    comparisons: Path | None, *, revision: str | None, trust_remote_code: bool,
) -> Recommendation:  # fmt: skip
    """See `polyquant.recommend`."""
    require(goal, needs)
    budget = read_budget(memory, None)  # raises for a wrong one before any file is read
    found = PlannedModel(model, revision=revision, trust_remote_code=trust_remote_code)
    return choose(plan_all(found, asked, budget), goal, needs, comparisons or comparisons_folder())


def require(goal: str, needs: Collection[str]) -> None:
    """Raises ConfigError for a goal or an ability that there is not."""
    require_goal(goal)
    for need in needs:
        if need not in ABILITIES:
            raise ConfigError(f"no ability {need!r}; there are {', '.join(ABILITIES)}.{did_you_mean(need, ABILITIES)}")


def choose(plans: Plans, goal: Goal, needs: Collection[str], folder: Path) -> Recommendation:
    """Filter by abilities, environment and plan, then order: measured ones by their figure, the others after them.

    folder: of comparisons, whose results on this machine and model are used.
    """
    lacking = {row.candidate.name: reason for row in plans.rows if (reason := _lacks(row.candidate.backend, needs))}
    excluded = dict(lacking)
    excluded |= {
        row.candidate.name: row.reason + (f"; fix: {row.fix}" if row.status == "does not run" and row.fix else "")
        for row in plans.rows
        if row.status != "fits" and row.candidate.name not in lacking
    }
    excluded |= {absent.backend: f"not installed; {absent.command}" for absent in plans.absent}
    left = [row for row in plans.fitting if row.candidate.name not in lacking]
    measured = measured_here([row.candidate for row in left], plans.model, folder)
    for name, each in measured.items():
        failed = [check.name for check in each.result.failed_checks]
        if failed:
            excluded[name] = f"its verification failed when it was measured ({', '.join(failed)})"
    left = [row for row in left if row.candidate.name not in excluded]
    left.sort(key=lambda row: _order(row, goal, measured))
    choices = tuple(_choice(row, goal, measured, plans) for row in left)
    return Recommendation(
        model=plans.model,
        goal=goal,
        memory_bytes=plans.memory_bytes,
        reason=_sentence(choices, plans, goal),
        choices=choices,
        excluded=excluded,
        advice=() if choices else _advice(plans, lacking),
    )


def _lacks(backend: str, needs: Collection[str]) -> str:
    """Which of the needed abilities a backend has not; empty where it has all."""
    card = next((info for info in handles.backends() if info.name == backend), None)
    missing = [need for need in needs if card is not None and not getattr(card.capabilities, need)]
    return f"it has not: {', '.join(missing)}" if missing else ""


def _figure(result: Measured | None, goal: Goal) -> float | None:
    """The measured figure that decides, smaller is better."""
    if result is None:
        return None
    if goal == "quality":
        return result.result.quality.kl_mean if result.result.quality else None
    if goal == "speed":
        speed = result.result.speed
        return -speed.generated_tokens_per_second.mean if speed else None
    memory = result.result.memory
    return float(memory.weights_stored_bytes) if memory else None


def _order(row: PlannedRow, goal: Goal, measured: Mapping[str, Measured]) -> tuple[Any, ...]:
    """Measured ones by their figure; then, for memory, fewest bytes; else by what is declared and published."""
    assert row.plan is not None  # it fits
    figure = _figure(measured.get(row.candidate.name), goal)
    if figure is None and goal == "speed" and (foreseen := _foreseen(row)):
        figure = -foreseen
    scale = standing(row.plan).order
    if goal == "memory":
        return (False, row.plan.needed_bytes, *scale, row.candidate.name)
    if figure is not None:
        return (False, figure, *scale, row.candidate.name)
    if goal == "speed":  # fewer bytes to read for each token, where nothing was measured
        return (True, row.plan.weights_planned_bytes, *scale, row.candidate.name)
    return (True, 0.0, *scale, row.plan.needed_bytes, row.candidate.name)


def _foreseen(row: PlannedRow) -> float | None:
    """Generated tokens a second; None where it was not asked for, or cannot be foreseen."""
    found = row.plan.foreseen if row.plan else None
    return found.generated_tokens_per_second if found else None


def _choice(row: PlannedRow, goal: Goal, measured: Mapping[str, Measured], plans: Plans) -> Choice:
    assert row.plan is not None
    found = measured.get(row.candidate.name)
    figure = _figure(found, goal)
    if goal == "memory":
        reason = f"it needs {size(row.plan.needed_bytes)} by its plan"
    elif figure is not None and found is not None:
        reason = f"measured here: {FIGURES[goal].format(abs(figure))} ({found.folder})"
    elif goal == "speed" and (foreseen := _foreseen(row)):
        reason = FORESEEN + FIGURES["speed"].format(foreseen)
    elif goal == "speed":
        reason = f"{size(row.plan.weights_planned_bytes)} of weights to read for each token; its speed was not measured"
    else:
        reason = standing(row.plan).words
    return Choice(
        candidate=row.candidate,
        reason=reason,
        measured=figure is not None and goal != "memory",
        needed_bytes=row.plan.needed_bytes,
        command=row.fix or load_command(row.candidate, plans.model),
    )


def _sentence(choices: tuple[Choice, ...], plans: Plans, goal: Goal) -> str:
    if not choices:
        return f"nothing that runs here fits {size(plans.memory_bytes)}"
    first = choices[0]
    among = f"of {len(choices)} candidates that run on {plans.device} and fit {size(plans.memory_bytes)}"
    best = {
        "quality": "it should lose least" if not first.measured else "it is closest to the dense model",
        "speed": "it should be the quickest" if not first.measured else "it is the quickest",
        "memory": "it needs least",
    }[goal]
    return f"{first.candidate.name}: {among}, {best} ({first.reason})"


def _advice(plans: Plans, lacking: Mapping[str, str]) -> tuple[str, ...]:
    """What would have to give, where nothing fits."""
    planned = [row for row in plans.rows if row.plan and row.status == "too big" and row.candidate.name not in lacking]
    if not planned:
        return ("none of the backends that run here can do this with this model: see what excludes each",)
    nearest = min(planned, key=lambda row: row.plan.needed_bytes if row.plan else 0)
    plan = nearest.plan
    assert plan is not None
    found = [
        f"the nearest is {nearest.candidate.name}: it needs {size(plan.needed_bytes)}, "
        f"{size(plan.needed_bytes - plan.memory_bytes)} more than there is"
    ]
    loading = plan.load_peak_bytes - plan.reclaimable_bytes
    if plan.kv_cache_bytes and loading <= plan.memory_bytes:
        fixed = plan.needed_bytes - plan.kv_cache_bytes - (plan.activation_bytes or 0)
        each = (plan.kv_cache_bytes + (plan.activation_bytes or 0)) / (plan.context * plan.batch)
        tokens = int((plan.memory_bytes - fixed) / each / plan.batch)
        if tokens >= 1:
            found.append(f"a context of {tokens} tokens instead of {plan.context} would fit (--context {tokens})")
    dense = plan.weights_planned_bytes - plan.quantized_bytes
    if dense > plan.weights_planned_bytes / 2:
        found.append(f"{size(dense)} of its {size(plan.weights_planned_bytes)} stay dense: {_why_dense(plan.tensors)}")
    found.append("else fewer bits, a smaller model, or more memory")
    return tuple(found)


def _why_dense(tensors: Any) -> str:
    largest = max((tensor for tensor in tensors if not tensor.quantized), key=lambda tensor: tensor.stored_bytes)
    return f"{largest.name} ({largest.reason}) is the largest"
