"""Which format for which unit: the least sum of KL under a budget of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Choice(NamedTuple):
    """A format that a unit may have."""

    format: str
    nbytes: int
    kl: float  # nats a position, that it alone causes


class _Step(NamedTuple):
    """From one choice of a unit to the next larger one that is worth it."""

    saved: float  # KL for each byte
    unit: int
    order: int  # among the unit's steps
    to: Choice


def assign(units: Sequence[Sequence[Choice]], budget: int) -> list[Choice]:
    """A choice for each unit, at most `budget` bytes together.

    All begin with their smallest. Then steps up are taken, that which saves most KL for each byte first, along each
    unit's lower convex hull of KL over bytes: each stage is the best for the bytes it takes. What is left of the budget
    goes to whichever single changes still fit, so that it ends at most one step of one unit short of the best.
    Raises ValueError where not even the smallest fit.
    """
    left = budget - sum(min(choice.nbytes for choice in choices) for choices in units)
    if left < 0:
        raise ValueError(f"the smallest choices take {-left} bytes more than {budget}")
    hulls = [_hull(choices) for choices in units]
    chosen = [hull[0] for hull in hulls]
    steps = [
        _Step((below.kl - above.kl) / (above.nbytes - below.nbytes), unit, order, above)
        for unit, hull in enumerate(hulls)
        for order, (below, above) in enumerate(pairwise(hull))
    ]
    stopped: set[int] = set()
    for step in sorted(steps, key=lambda step: (-step.saved, step.unit, step.order)):
        more = step.to.nbytes - chosen[step.unit].nbytes
        if step.unit in stopped or more > left:
            stopped.add(step.unit)
            continue
        chosen[step.unit], left = step.to, left - more
    while changes := [
        (chosen[unit].kl - choice.kl, unit, choice)
        for unit, choices in enumerate(units)
        for choice in choices
        if choice.kl < chosen[unit].kl and choice.nbytes - chosen[unit].nbytes <= left
    ]:
        _, unit, best = max(changes)
        left -= best.nbytes - chosen[unit].nbytes
        chosen[unit] = best
    return chosen


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull, smallest first: each saves less KL for a byte than the one before."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.nbytes, choice.kl)):
        if hull and choice.kl >= hull[-1].kl:
            continue
        while len(hull) > 1 and _saved(hull[-2], choice) >= _saved(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return hull


def _saved(below: Choice, above: Choice) -> float:
    return (below.kl - above.kl) / (above.nbytes - below.nbytes)
