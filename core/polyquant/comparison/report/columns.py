"""The columns of a comparison, each declared once: where it appears, what is done with it. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from polyquant.comparison.records import OTHER_WORK, Goal, Run
from polyquant.comparison.report.formats import percent, ratio, significant, times, with_error
from polyquant.support.sizes import size

Place = Literal["page", "page details", "page conditions", "frontier", "markdown", "terminal", "wide terminal"]
"""Where a column appears, beside CSV, JSON and pandas, which have all of them.

page: the table of candidates, whose rows open and show the details, conditions first; frontier: the page's table below
the plot, and the texts of its points; wide terminal: only where a terminal has room for it.
"""
Noise = Literal["standard error", "standard deviation", "exact", "share"]
"""What two comparisons may differ by, and mean nothing: see `difference`."""
MARK = "*"
"""After a speed that was measured beside other work; `measured_on.other_work` says what it means."""
STANDARD_ERROR = "_standard_error"  # ends the key of the standard error of a task's score


class Column(NamedTuple):
    """A column: one figure, or one text, of every row."""

    key: str  # in CSV, JSON, pandas and `plain_rows`
    heading: str = ""
    unit: str = ""  # after the heading of a table, or after the text of a detail; empty where one of these has it
    short: str = ""  # heading in a terminal, where it is another
    meaning: str = ""  # what the page says of a heading that is pointed at
    format: Callable[[Any], str] | None = None  # None: with its error, or as it is
    error: str = ""  # key of its standard error or deviation
    places: tuple[Place, ...] = ()
    noted: bool = False  # whether notes on the whole comparison concern it
    better: Literal["lower", "higher"] = "lower"
    goal: Goal | None = None  # the goal whose best candidate it decides
    axis: str = ""  # its name where KL can be plotted against it
    axis_title: str = ""
    timed: bool = False  # whether other work on the same cores changes it: it is marked there
    noise: Noise | None = None  # None: two comparisons are not compared by it

    @property
    def title(self) -> str:
        """The heading with its unit."""
        return f"{self.heading} ({self.unit})" if self.unit else self.heading

    def text(self, values: Mapping[str, Any]) -> str:
        """The figure of a row as people read it; empty where it was not measured."""
        value = values.get(self.key)
        if value is None or value == "":
            return ""
        if self.format is not None:
            text = self.format(value)
        else:
            text = with_error(value, values.get(self.error)) if self.error else str(value)
        return f"{text} {MARK}" if self.timed and (values.get("other_work_share") or 0.0) > OTHER_WORK else text


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
    Column(key="kl_median", heading="KL, median", unit="nats", format=significant, places=("page details",)),
    Column(key="kl_p99", heading="KL, 99 %", unit="nats", format=significant, places=("page details",)),
    Column(key="kl_max", heading="KL, maximum", unit="nats", format=significant, places=("page details",)),
    Column(
        key="top1",  # share of positions
        heading="top-1",
        meaning="Share of positions where both put the same token first",
        format=percent,
        error="top1_standard_error",
        places=("page", "frontier", "markdown", "terminal"),
        noted=True,
        better="higher",
        noise="standard error",
    ),
    Column(key="top1_standard_error"),
    Column(key="perplexity", heading="perplexity", format="{:.4g}".format, places=("page details",)),
    Column(
        key="perplexity_ratio",
        heading="perplexity ratio",
        short="ppl ratio",
        meaning="Over the reference's",
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
        meaning="Mean and standard deviation",
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
        unit="s after a prompt of 512",
        format=significant,
        timed=True,
        places=("page details",),
    ),
    Column(key="load_seconds", heading="load", unit="s", format=significant, places=("page details",)),
    Column(key="quantize_seconds", heading="quantize", unit="s", format=significant, places=("page details",)),
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
    """COLUMNS, and two for each metric of each task that was run: the score and its standard error."""
    names = dict.fromkeys(score.column for row in run.rows if row.result for score in row.result.scores)
    return [*COLUMNS, *(column for name in names for column in _of_score(name))]


def shown(columns: Sequence[Column], *places: Place) -> list[Column]:
    """Those that appear in one of the places."""
    return [column for column in columns if set(places) & set(column.places)]


def _of_score(name: str) -> tuple[Column, Column]:
    score = Column(
        key=name, heading=name, meaning="Score of a task, with its standard error", error=f"{name}{STANDARD_ERROR}",
        places=("page", "markdown"), better="higher", noise="standard error",
    )  # fmt: skip
    return score, Column(key=score.error)
