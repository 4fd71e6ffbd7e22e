"""What a picture of plans shows: a bar for each candidate, split by what the memory is for, and the budget."""

from __future__ import annotations

from typing import NamedTuple

from polyquant.planning.records import Plan, Plans

PARTS = ("quantized weights", "dense weights", "constants", "key-value cache", "activations and process")
COLOURS = {
    "quantized weights": "#2b6cb0", "dense weights": "#718096", "constants": "#c05621", "key-value cache": "#2f855a",
    "activations and process": "#cbd5e0",
}  # fmt: skip


class Bar(NamedTuple):
    """One candidate: bytes by part, in the order of PARTS; constants are scales, zero points, absmax and padding."""

    name: str
    parts: tuple[int, ...]
    fits: bool

    @property
    def total_bytes(self) -> int:
        return sum(self.parts)


def bars_of(what: Plan | Plans) -> list[Bar]:
    """The bars of a plan or of a table, in its order. A candidate without a plan has none.

    The last part is what else is needed at the fullest moment: a bar is as long as `needed_bytes`.
    """
    if isinstance(what, Plan):
        return [_bar(f"{what.backend}", what)]
    return [_bar(row.candidate.name, row.plan) for row in what.rows if row.plan is not None]


def _bar(name: str, plan: Plan) -> Bar:
    parts = (
        plan.quantized_bytes - plan.constant_bytes,
        plan.weights_planned_bytes - plan.quantized_bytes,
        plan.constant_bytes,
        plan.kv_cache_bytes or 0,
    )
    return Bar(name, (*parts, max(0, plan.needed_bytes - sum(parts))), plan.fits)
