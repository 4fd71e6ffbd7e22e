"""The parts of the report's page that are text: the table with its details, and the machines. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from polyquant.comparison.records import Comparison
from polyquant.comparison.report.rows import COLUMNS, columns, is_reference, reason, status
from polyquant.comparison.report.rows import rows as plain_rows
from polyquant.comparison.report.words import bfloat16_share, first_line, last_lines, share, times, uncertain
from polyquant.support.machine import Machine
from polyquant.support.sizes import size

Cell = Mapping[str, Any]


class Column(NamedTuple):
    """A column of the page's table."""

    key: str  # the figure it is sorted by
    text: str
    title: str
    words: Callable[[Cell], str]
    note: bool = False  # whether notes on the whole comparison concern it
    sorted: bool = False


def _of(key: str, words: Callable[[Any], str]) -> Callable[[Cell], str]:
    return lambda cell: "" if cell.get(key) is None else words(cell[key])


def _with_error(key: str, error: str) -> Callable[[Cell], str]:
    return lambda cell: uncertain(cell.get(key), cell.get(error))


TABLE = (
    Column(
        "kl_mean",
        "KL\nnats",
        "KL(reference || candidate), mean and standard error",
        _with_error("kl_mean", "kl_standard_error"),
        note=True,
        sorted=True,
    ),
    Column("top1", "top-1", "Share of positions where both put the same token first", _of("top1", share), note=True),
    Column("perplexity_ratio", "perplexity\nratio", "Over the reference's", _of("perplexity_ratio", times), note=True),
    Column("weights_stored_bytes", "stored", "Weights, every storage once", _of("weights_stored_bytes", size)),
    Column(
        "ratio_to_bfloat16",
        "of\nbfloat16",
        "Stored bytes over the dense model's in bfloat16",
        _of("ratio_to_bfloat16", bfloat16_share),
    ),
    Column(
        "bits_per_weight",
        "bits a\nweight",
        "Of the quantized tensors, scales and other constants included",
        _of("bits_per_weight", "{:.2f}".format),
    ),
    Column("load_peak_bytes", "load\npeak", "Most memory while loading", _of("load_peak_bytes", size)),
    Column(
        "prompt_tokens_per_second",
        "prompt\ntokens/s",
        "Mean and standard deviation",
        _with_error("prompt_tokens_per_second", "prompt_tokens_per_second_standard_deviation"),
    ),
    Column(
        "generated_tokens_per_second",
        "generated\ntokens/s",
        "Batch of one, mean and standard deviation",
        _with_error("generated_tokens_per_second", "generated_tokens_per_second_standard_deviation"),
    ),
)
DETAILS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("kernel", "kernel", str),
    ("compute dtype", "compute_dtype", str),
    ("device", "device", str),
    ("threads", "threads", str),
    ("KL, median", "kl_median", lambda value: f"{value:.3g} nats"),
    ("KL, 99 %", "kl_p99", lambda value: f"{value:.3g} nats"),
    ("KL, maximum", "kl_max", lambda value: f"{value:.3g} nats"),
    ("perplexity", "perplexity", lambda value: f"{value:.4g}"),
    ("tokens scored", "tokens_scored", str),
    ("after a forward pass", "weights_after_forward_bytes", size),
    ("checkpoint on disk", "checkpoint_bytes", size),
    ("run peak", "run_peak_bytes", size),
    ("key-value cache", "kv_cache_bytes_per_token", lambda value: f"{size(value)} a token"),
    ("first token", "first_token_seconds", lambda value: f"{value:.3g} s after a prompt of 512"),
    ("load", "load_seconds", lambda value: f"{value:.3g} s"),
    ("quantize", "quantize_seconds", lambda value: f"{value:.3g} s"),
)


def headings(comparison: Comparison) -> list[dict[str, Any]]:
    """Of the page's table."""
    name = {"text": "candidate", "title": "Backend and options", "note": False, "sorted": False}
    return [name, *(column._asdict() for column in (*TABLE, *_tasks(comparison)))]


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Of the page's table, closest to the reference first."""
    shown = (*TABLE, *_tasks(comparison))
    found = []
    for index, (row, cell) in enumerate(zip(comparison.rows, plain_rows(comparison), strict=True)):
        why, result = reason(row), row.result
        details = [(name, words(cell[key])) for name, key, words in DETAILS if cell[key] not in (None, "")]
        options = ", ".join(f"{name}={_value(value)}" for name, value in row.candidate.options.items())
        found.append(
            {
                "index": index,
                "name": row.candidate.name,
                "backend": cell["backend"] or "checkpoint",
                "status": status(row),
                "kl": cell["kl_mean"],
                "cells": [
                    {"text": each.words(cell), "value": "" if cell.get(each.key) is None else cell[each.key]}
                    for each in shown
                ],
                "reason": first_line(why),
                "last_lines": last_lines(why),
                "notes": result.notes if result else (),
                "reference": is_reference(row, comparison),
                "command": row.command,
                "details": [*([("options", options)] if options else []), *details],
                "words": " ".join((row.candidate.name, cell["kernel"] or "", status(row), options, why)).lower(),
                "layers": bool(result and result.layers),
            }
        )
    return sorted(found, key=lambda row: (row["kl"] is None, row["kl"] or 0.0))


def machines(comparison: Comparison) -> list[dict[str, Any]]:
    """The machines that measured it, with the versions they had; one where all rows are of the same machine."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in comparison.rows:
        machine = row.result.machine if row.result else None
        if machine is None:
            continue
        facts = _facts(machine)
        each = found.setdefault(tuple(text for _, text in facts), {"facts": facts, "candidates": [], "versions": {}})
        each["candidates"].append(row.candidate.name)
        for library, version in machine.versions.items():
            each["versions"].setdefault(library, set()).add(version)
    if not found:
        machine = comparison.machine
        versions = {library: {version} for library, version in machine.versions.items()}
        found[()] = {"facts": _facts(machine), "candidates": [], "versions": versions}
    for each in found.values():
        each["versions"] = [(library, ", ".join(sorted(known))) for library, known in sorted(each["versions"].items())]
    return list(found.values())


def _facts(machine: Machine) -> list[tuple[str, str]]:
    facts = [
        ("processor", machine.processor),
        ("cores", str(machine.cores)),
        ("memory", size(machine.memory_bytes)),
        ("accelerators", ", ".join(machine.accelerators)),
        ("system", machine.system),
        ("Python", machine.python),
    ]
    return [(name, text) for name, text in facts if text]


def _tasks(comparison: Comparison) -> list[Column]:
    names = [name for name in columns(comparison)[len(COLUMNS) :] if not name.endswith("_standard_error")]
    return [
        Column(name, name, "Score of a task, with its standard error", _with_error(name, f"{name}_standard_error"))
        for name in names
    ]


def _value(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
