"""Choosing from a comparison: the frontier, and the best candidate for a goal and a budget. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from polyquant.comparison.records import Goal, Row, Run
from polyquant.comparison.report.columns import GOALS
from polyquant.comparison.report.rows import values_of
from polyquant.errors import ConfigError, PolyquantError, did_you_mean
from polyquant.support.sizes import parse_size, size

USABLE_KL = 0.5
"""Nats: for the goals speed and memory, candidates that are further from the reference are out."""
CONTEXT_TOKENS = 2048


def best(
    run: Run,
    goal: Goal = "quality",
    *,
    memory: int | str | None = None,
    kl: float | None = None,
    context_tokens: int = CONTEXT_TOKENS,
) -> Row:
    """The best candidate that was measured.

    goal: quality is the lowest KL to the reference, speed the most generated tokens a second, memory the fewest stored
        bytes. Candidates whose verification failed are out, and so is the reference; for speed, what is emulated.
    memory: budget, bytes or such as '6GiB', for what `needed_bytes` counts; None: any.
    kl: most nats from the reference; None: any for quality, USABLE_KL for speed and memory.
    Raises PolyquantError where nothing was measured or nothing fits; it names the nearest.
    """
    require_goal(goal)
    column, kl_key = GOALS[goal], GOALS["quality"].key
    limit = USABLE_KL if kl is None and goal != "quality" else kl
    candidates = [
        row for row in run.done
        if row.status == "done" and not run.is_reference(row) and not (goal == "speed" and row.candidate.emulated)
    ]  # fmt: skip
    measured = [(row, values) for row in candidates if (values := values_of(row))[column.key] is not None]
    if not measured:
        raise PolyquantError(
            f"no candidate of {run.folder} was measured for the goal {goal} and passed its verification; "
            f"see what failed with: polyquant report {run.folder}"
        )
    close = [(row, values) for row, values in measured if limit is None or (values[kl_key] or 0.0) <= limit]
    if not close:
        row, values = min(measured, key=lambda pair: pair[1][kl_key] or 0.0)
        raise PolyquantError(
            f"no candidate is within {limit:g} nats (KL) of the reference: the nearest is {row.candidate.name} with "
            f"{values[kl_key]:.3g}; allow more (kl=), or compare candidates with more bits"
        )
    fitting = _fitting([row for row, _ in close], run, memory, context_tokens)
    sign = 1 if column.better == "lower" else -1
    return min(
        (pair for pair in close if pair[0] in fitting),
        key=lambda pair: (sign * pair[1][column.key], pair[1]["weights_stored_bytes"] or 0),
    )[0]


def require_goal(goal: str) -> None:
    """Raises ConfigError for a goal that there is not."""
    goals = get_args(Goal)
    if goal not in goals:
        raise ConfigError(f"the goal is one of {', '.join(goals)}, got {goal!r}.{did_you_mean(goal, goals)}")


def needed_bytes(row: Row, run: Run, context_tokens: int = CONTEXT_TOKENS) -> int | None:
    """What running a candidate takes: its weights, as stored or, where that is more, as they are after a forward pass,
    and the key-value cache of a context. None where the weights were not measured.

    A candidate whose cache was not measured is given the largest of the others: it is a matter of the model.
    """
    if row.result is None or (stored := row.result.weights_stored_bytes) is None:
        return None
    after = row.result.memory.weights_after_forward_bytes if row.result.memory else 0
    memories = [other.result.memory for other in run.done if other.result and other.result.memory]
    largest = max((known.kv_cache_bytes_per_token or 0 for known in memories), default=0)
    own = row.result.memory.kv_cache_bytes_per_token if row.result.memory else None
    bytes_per_token = largest if own is None else own
    return max(stored, after) + bytes_per_token * context_tokens


def frontier(points: Sequence[tuple[float, float] | None]) -> list[int]:
    """Indices of the points (x, y), the lower the better both, that no other is better than in both; by rising x."""
    order = sorted((point, index) for index, point in enumerate(points) if point is not None)
    unbeaten: list[int] = []
    lowest = float("inf")
    for (_, y), index in order:
        if y < lowest:
            unbeaten.append(index)
            lowest = y
    return unbeaten


def _fitting(rows: list[Row], run: Run, memory: int | str | None, context_tokens: int) -> list[Row]:
    if memory is None:
        return rows
    budget = parse_size(memory)
    needs = [(needed, row) for row in rows if (needed := needed_bytes(row, run, context_tokens)) is not None]
    fitting = [row for needed, row in needs if needed <= budget]
    if fitting:
        return fitting
    nearest = min(needs, key=lambda pair: pair[0], default=None)
    hint = f"; the nearest is {nearest[1].candidate.name}, which needs {size(nearest[0])}" if nearest else ""
    raise PolyquantError(
        f"no candidate fits into {size(budget)} with the key-value cache of {context_tokens} tokens{hint}: "
        "raise memory, lower context_tokens, or compare candidates with fewer bits"
    )
