"""The columns of a comparison, each declared once: where it appears, what is done with it. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

from polyquant.comparison.records import Run
from polyquant.comparison.report import behaviour
from polyquant.comparison.report.column import Column, Place
from polyquant.comparison.report.formats import percent, ratio, significant, times
from polyquant.support.sizes import size

STANDARD_ERROR = "_standard_error"  # ends the key of the standard error of a task's score

COLUMNS = (
    Column(key="candidate", heading="candidate"),
    Column(key="status"),
    Column(key="reason"),
    Column(
        key="kl_mean",
        heading="KL",
        unit="nats",
        meaning="KL(reference || candidate), mean and standard error",
        error="kl_standard_error",
        places=("page", "frontier", "markdown", "terminal"),
        noted=True,
        goal="quality",
        noise="standard error",
    ),
    Column(key="kl_standard_error"),
    Column(
        key="kl_median",
        heading="KL, median",
        unit="nats",
        format=significant,
        places=("page details",),
        meaning="Half of the scored positions are closer than that; quantiles and the maximum have no error here",
    ),
    Column(key="kl_p99", heading="KL, 99 %", unit="nats", format=significant, places=("page details",)),
    Column(key="kl_max", heading="KL, maximum", unit="nats", format=significant, places=("page details",)),
    Column(
        key="top1",  # share of positions
        heading="top-1",
        meaning="Share of positions where both put the same token first, and standard error",
        format=percent,
        percent=True,
        error="top1_standard_error",
        places=("page", "frontier", "markdown", "terminal"),
        noted=True,
        better="higher",
        noise="standard error",
    ),
    Column(key="top1_standard_error"),
    Column(
        key="perplexity",
        heading="perplexity",
        format="{:.4g}".format,
        error="perplexity_standard_error",
        places=("page details",),
        meaning="exp of the mean negative log-likelihood of the text, and standard error",
    ),
    Column(key="perplexity_standard_error"),
    Column(
        key="perplexity_ratio",
        heading="perplexity ratio",
        short="ppl ratio",
        meaning="Perplexity over the reference's, and standard error",
        format=ratio,
        error="perplexity_ratio_standard_error",
        places=("page", "markdown", "wide terminal"),
        noted=True,
        noise="standard error",
    ),
    Column(key="perplexity_ratio_standard_error"),
    Column(key="tokens_scored", heading="tokens scored", places=("page details",)),
    Column(
        key="weights_stored_bytes",
        heading="stored",
        meaning="Weights, every storage once",
        format=size,
        places=("page", "frontier", "markdown", "terminal"),
        goal="memory",
        axis="stored size",
        axis_title="stored weights",
        noise="exact",
    ),
    Column(
        key="ratio_to_bfloat16",  # of the whole model
        heading="of bfloat16",
        short="of bf16",
        meaning="Stored bytes over the dense model's in bfloat16",
        format=times,
        places=("page", "frontier", "markdown", "wide terminal"),
    ),
    Column(
        key="bits_per_weight",
        heading="bits a weight",
        meaning="Of the quantized tensors, scales and other constants included",
        format="{:.2f}".format,
        places=("page",),
    ),
    Column(key="weights_after_forward_bytes", heading="after a forward pass", format=size, places=("page details",)),
    Column(key="checkpoint_bytes", heading="checkpoint on disk", format=size, places=("page details",)),
    Column(
        key="load_peak_bytes",
        heading="load peak",
        meaning="Most memory while loading",
        format=size,
        places=("page",),
        noise="share",
    ),
    Column(key="run_peak_bytes", heading="run peak", format=size, places=("page details",)),
    Column(
        key="kv_cache_bytes_per_token", heading="key-value cache", unit="a token", format=size, places=("page details",)
    ),
    Column(
        key="prompt_tokens_per_second",
        heading="prompt tokens/s",
        short="prompt tok/s",
        meaning="Prompt of 512 tokens: mean and standard deviation",
        error="prompt_tokens_per_second_standard_deviation",
        places=("page", "frontier", "markdown", "wide terminal"),
        better="higher",
        axis="prompt speed",
        axis_title="prompt tokens/s",
        timed=True,
        noise="standard deviation",
    ),
    Column(key="prompt_tokens_per_second_standard_deviation"),
    Column(
        key="generated_tokens_per_second",
        heading="generated tokens/s",
        short="gen. tok/s",
        meaning="Batch of one, mean and standard deviation",
        error="generated_tokens_per_second_standard_deviation",
        places=("page", "frontier", "markdown", "terminal"),
        better="higher",
        goal="speed",
        axis="generation speed",
        axis_title="generated tokens/s",
        timed=True,
        noise="standard deviation",
    ),
    Column(key="generated_tokens_per_second_standard_deviation"),
    Column(
        key="first_token_seconds",
        heading="first token",
        meaning="Time to it, after a prompt of 512 tokens: mean and standard deviation",
        error="first_token_seconds_standard_deviation",
        unit="s after a prompt of 512",
        format=significant,
        timed=True,
        places=("page details",),
    ),
    Column(key="first_token_seconds_standard_deviation"),
    Column(key="load_seconds", heading="load", unit="s (one run)", format=significant, places=("page details",)),
    Column(
        key="quantize_seconds", heading="quantize", unit="s (one run)", format=significant, places=("page details",)
    ),
    Column(key="backend"),
    Column(key="kernel", heading="kernel", places=("page conditions",)),
    Column(key="compute_dtype", heading="compute dtype", places=("page conditions",)),
    Column(key="emulated_activations", heading="activations emulated", places=("page conditions",)),
    Column(key="device", heading="device", places=("page conditions",)),
    Column(key="threads", heading="threads", places=("page conditions",)),
    Column(
        key="other_work_share", heading="other work", unit="of the cores", format=percent, places=("page conditions",)
    ),
    Column(key="notes"),
    Column(key="command"),
)
"""Of every comparison; `columns_of` adds those of its tasks."""
KEYS = tuple(column.key for column in COLUMNS)
GOALS = {column.goal: column for column in COLUMNS if column.goal is not None}
"""What decides which candidate is best."""
SPEEDS = tuple(column for column in COLUMNS if column.noise == "standard deviation")
"""Means of repetitions, with their standard deviations."""
AXES = sorted((column for column in COLUMNS if column.axis), key=lambda column: column.goal is None)
"""What KL is plotted against; those that a goal goes by come first."""


def columns_of(run: Run) -> list[Column]:
    """COLUMNS, those of behaviour where it was measured, and two for each metric of each task."""
    names = dict.fromkeys(score.column for row in run.rows if row.result for score in row.result.scores)
    of_behaviour = behaviour.COLUMNS if behaviour.asked_in(run) else ()
    return [*COLUMNS, *of_behaviour, *(column for name in names for column in _of_score(name))]


def shown(columns: Sequence[Column], *places: Place) -> list[Column]:
    """Those that appear in one of the places."""
    return [column for column in columns if set(places) & set(column.places)]


def _of_score(name: str) -> tuple[Column, Column]:
    score = Column(
        key=name, heading=name, meaning="Score of a task, with its standard error", error=f"{name}{STANDARD_ERROR}",
        places=("page", "markdown"), better="higher", noise="standard error",
    )  # fmt: skip
    return score, Column(key=score.error)
