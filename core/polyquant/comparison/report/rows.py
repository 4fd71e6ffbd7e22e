"""A comparison as plain rows: the value of every column. Imports nothing heavy."""

from __future__ import annotations

import statistics
import textwrap
from typing import Any

from polyquant.comparison.records import Result, Row, Run
from polyquant.comparison.report import behaviour
from polyquant.comparison.report.columns import GOALS, KEYS, SPEEDS, STANDARD_ERROR


def plain_rows(run: Run) -> list[dict[str, Any]]:
    """The values of every row, in the order of the comparison."""
    dense_bytes = bfloat16_bytes(run)
    return [values_of(row, dense_bytes) for row in run.rows]


def bfloat16_bytes(run: Run) -> int | None:
    """The model's weights, dense, in bfloat16; None where no candidate was loaded."""
    memories = (row.result.memory for row in run.rows if row.result is not None)
    return next((memory.weights_bfloat16_bytes for memory in memories if memory is not None), None)


def values_of(row: Row, dense_bytes: int | None = None) -> dict[str, Any]:
    """A candidate's plain values by column; None for what was not measured.

    dense_bytes: the model in bfloat16, for rows of the dense model.
    """
    values: dict[str, Any] = dict.fromkeys(KEYS)
    values |= {
        "candidate": row.candidate.label, "status": row.status, "reason": row.reason, "command": row.command,
        "backend": row.candidate.backend,
    }  # fmt: skip
    result = row.result
    if result is None:
        return values
    stored, memory = result.weights_stored_bytes, result.memory
    dense = memory.weights_bfloat16_bytes if memory else dense_bytes
    values |= {
        "backend": result.job.backend, "kernel": result.kernel, "compute_dtype": result.compute_dtype,
        "emulated_activations": result.emulated_activations or None,
        "device": result.device, "threads": result.threads or None,
        "other_work_share": result.other_work_share, "notes": "; ".join(result.notes),
        "load_seconds": result.load_seconds, "quantize_seconds": result.quantize_seconds,
        "weights_stored_bytes": stored, "ratio_to_bfloat16": stored / dense if stored and dense else None,
        "bits_per_weight": result.bits_per_weight,
    }  # fmt: skip
    for part in (result.quality, memory, result.speed):
        values |= {key: getattr(part, key) for key in KEYS if values[key] is None and hasattr(part, key)}
    if result.speed:
        for column in SPEEDS:
            rate = getattr(result.speed, column.key)
            values |= {column.key: rate.mean, column.error: rate.standard_deviation}
        prompts = [result.speed.prompt_tokens / rate for rate in result.speed.prompt_tokens_per_second.repetitions]
        values["first_token_seconds_standard_deviation"] = statistics.stdev(prompts) if len(prompts) > 1 else 0.0
    return values | behaviour.values_of(result) | _scores(result)


def by_quality(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Closest to the reference first; what has no KL comes last, in its own order."""
    key = GOALS["quality"].key
    return sorted(rows, key=lambda values: (values[key] is None, values[key] or 0.0))


def first_line(reason: str) -> str:
    """A reason without what the process said last."""
    return reason.strip().partition("\n")[0].removesuffix("; it said last:")


def last_lines(reason: str) -> str:
    """What the process said last."""
    return textwrap.dedent(reason.strip().partition("\n")[2])


def _scores(result: Result) -> dict[str, float | None]:
    scores: dict[str, float | None] = {}
    for score in result.scores:
        scores |= {score.column: score.value, f"{score.column}{STANDARD_ERROR}": score.standard_error}
    return scores
