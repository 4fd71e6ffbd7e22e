"""A comparison as plain rows, and those as CSV, JSON and Markdown. Imports nothing heavy."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any, Literal

from polyquant.comparison.candidates import DENSE
from polyquant.comparison.records import Comparison, Result, Row
from polyquant.comparison.report.words import bfloat16_share, conditions, first_line, share, times, uncertain
from polyquant.support.sizes import size

Status = Literal["done", "check failed", "failed", "missing"]
COLUMNS = (
    "candidate",
    "status",
    "reason",
    "kl_mean",  # KL(reference || candidate), nats a position
    "kl_standard_error",
    "kl_median",
    "kl_p99",
    "kl_max",
    "top1",  # share of positions
    "top1_standard_error",
    "perplexity",
    "perplexity_ratio",  # to the reference's
    "tokens_scored",
    "weights_stored_bytes",
    "ratio_to_bfloat16",  # of the whole model
    "bits_per_weight",  # of the quantized tensors, constants included
    "weights_after_forward_bytes",
    "checkpoint_bytes",
    "load_peak_bytes",
    "run_peak_bytes",
    "kv_cache_bytes_per_token",
    "prompt_tokens_per_second",
    "prompt_tokens_per_second_standard_deviation",
    "generated_tokens_per_second",
    "generated_tokens_per_second_standard_deviation",
    "first_token_seconds",
    "load_seconds",
    "quantize_seconds",
    "backend",
    "kernel",
    "compute_dtype",
    "device",
    "threads",
    "notes",
    "command",
)
"""Of every comparison; `columns` adds those of its tasks."""


def columns(comparison: Comparison) -> list[str]:
    """The columns of a comparison: COLUMNS, and two for each metric of each task."""
    names = dict.fromkeys(name for row in comparison.rows for name in _scores(row.result))
    return [*COLUMNS, *names]


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """The cells of every row, in the order of the comparison."""
    return [cells(row, bfloat16_bytes(comparison)) for row in comparison.rows]


def bfloat16_bytes(comparison: Comparison) -> int | None:
    """The model's weights, dense, in bfloat16; None where no candidate was loaded."""
    memories = (row.result.memory for row in comparison.rows if row.result is not None)
    return next((memory.weights_bfloat16_bytes for memory in memories if memory is not None), None)


def cells(row: Row, dense_bytes: int | None = None) -> dict[str, Any]:
    """A candidate's plain values by column; None for what was not measured.

    dense_bytes: the model in bfloat16, for rows of the dense model.
    """
    found: dict[str, Any] = dict.fromkeys(COLUMNS)
    found |= {
        "candidate": row.candidate.name, "status": status(row), "reason": reason(row), "command": row.command,
        "backend": row.candidate.backend,
    }  # fmt: skip
    result = row.result
    if result is None:
        return found
    stored, memory = stored_bytes(result), result.memory
    plain = memory.weights_bfloat16_bytes if memory else dense_bytes
    found |= {
        "backend": result.job.backend, "kernel": result.kernel, "compute_dtype": result.compute_dtype,
        "device": result.device, "threads": result.threads or None, "notes": "; ".join(result.notes),
        "load_seconds": result.load_seconds, "quantize_seconds": result.quantize_seconds,
        "weights_stored_bytes": stored, "ratio_to_bfloat16": stored / plain if stored and plain else None,
        "bits_per_weight": result.bits_per_weight,
    }  # fmt: skip
    for part in (result.quality, memory, result.speed):
        found |= {name: getattr(part, name) for name in COLUMNS if found[name] is None and hasattr(part, name)}
    if result.speed:
        for name in ("prompt_tokens_per_second", "generated_tokens_per_second"):
            rate = getattr(result.speed, name)
            found |= {name: rate.mean, f"{name}_standard_deviation": rate.standard_deviation}
    return found | _scores(result)


def status(row: Row) -> Status:
    """Where a row stands; `check failed` is measured, but not what the backend promised."""
    if row.result is None:
        return "missing"
    if row.result.status == "failed":
        return "failed"
    return "check failed" if row.result.failed_checks else "done"


def reason(row: Row) -> str:
    """Why a row failed, with what its process said last; or the checks that did not pass. Empty where all is well."""
    if row.result is None:
        return "not measured yet"
    checks = (f"{check.name}: {check.found} (expected: {check.expected})" for check in row.result.failed_checks)
    return row.result.reason or "; ".join(checks)


def is_reference(row: Row, comparison: Comparison) -> bool:
    """Whether a row is what the others are compared with; `dense` and `dense:float32` are the same."""
    names = {DENSE: f"{DENSE}:float32"}
    name, reference = row.candidate.name, comparison.setting.reference
    return names.get(name, name) == names.get(reference, reference)


def stored_bytes(result: Result) -> int | None:
    """Bytes of the weights, every storage once."""
    if result.stored_bytes is None and result.memory is not None:
        return result.memory.weights_stored_bytes
    return result.stored_bytes


def by_quality(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Closest to the reference first; what has no KL comes last, in its own order."""
    return sorted(table, key=lambda cell: (cell["kl_mean"] is None, cell["kl_mean"] or 0.0))


def as_csv(comparison: Comparison) -> str:
    """One line a candidate, a line of headings first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(comparison), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(comparison))
    return text.getvalue()


def as_plain(comparison: Comparison) -> dict[str, Any]:
    """What scripts read: the setting, the machine, notes, and the rows."""
    return {
        "polyquant": comparison.version,
        "created": comparison.created,
        "command": comparison.command,
        "setting": comparison.setting,
        "machine": comparison.machine,
        "notes": comparison.notes,
        "rows": rows(comparison),
    }


def as_markdown(comparison: Comparison) -> str:
    """A table for a README or a pull request: few columns, what it was measured on, and what one must know of it."""
    table = by_quality(rows(comparison))
    tasks = [name for name in columns(comparison)[len(COLUMNS) :] if not name.endswith("_standard_error")]
    headings = [
        "candidate", "KL (nats)", "top-1", "perplexity ratio", "stored", "of bfloat16", "prompt tokens/s",
        "generated tokens/s", *tasks,
    ]  # fmt: skip
    measured = [cell for cell in table if cell["status"] in ("done", "check failed")]
    lines = [[_plain(text) for text in (*short(cell), *_task_words(cell, tasks))] for cell in measured]
    widths = [max(len(line[index]) for line in (headings, *lines)) for index in range(len(headings))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(word.rjust(width) for word, width in zip(line[1:], widths[1:], strict=True))]
        for line in (headings, rule, *lines)
    ]
    text = ["| " + " | ".join(line) + " |" for line in padded]
    bad = [cell for cell in table if cell["status"] != "done"]
    text += ["", conditions(comparison), *(["", *map(_bad, bad)] if bad else [])]
    text += ["", *(f"Note: {_plain(note)}." for note in comparison.notes)] if comparison.notes else []
    return "\n".join(text) + "\n"


def short(cell: Mapping[str, Any]) -> list[str]:
    """The few columns that decide, as people read them."""
    return [
        cell["candidate"],
        uncertain(cell["kl_mean"], cell["kl_standard_error"]),
        share(cell["top1"]),
        times(cell["perplexity_ratio"]),
        "" if cell["weights_stored_bytes"] is None else size(cell["weights_stored_bytes"]),
        bfloat16_share(cell["ratio_to_bfloat16"]),
        uncertain(cell["prompt_tokens_per_second"], cell["prompt_tokens_per_second_standard_deviation"]),
        uncertain(cell["generated_tokens_per_second"], cell["generated_tokens_per_second_standard_deviation"]),
    ]


def _task_words(cell: Mapping[str, Any], tasks: list[str]) -> list[str]:
    return [uncertain(cell.get(task), cell.get(f"{task}_standard_error")) for task in tasks]


def _scores(result: Result | None) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for score in result.scores if result else ():
        name = f"{score.task}_{score.metric}"
        found |= {name: score.value, f"{name}_standard_error": score.standard_error}
    return found


def _bad(cell: Mapping[str, Any]) -> str:
    return f"- {_plain(cell['candidate'])} ({cell['status']}): {_plain(first_line(cell['reason']))}"


def _plain(text: str) -> str:
    """Text that means nothing to Markdown or HTML."""
    for sign in "\\|<>[]*_`":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("&", "&amp;").replace("\n", " ")
