"""A column of a comparison: one figure of every row, and what is done with it. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from polyquant.comparison.records import OTHER_WORK, Goal
from polyquant.comparison.report.formats import with_error

Place = Literal["page", "page details", "page conditions", "frontier", "markdown", "terminal", "wide terminal"]
"""Where a column appears, beside CSV, JSON and pandas, which have all of them.

page: the table of candidates, whose rows open and show the details, conditions first; frontier: the page's table below
the plot, and the texts of its points; wide terminal: only where a terminal has room for it.
"""
Noise = Literal["standard error", "standard deviation", "exact", "share"]
"""What two comparisons may differ by, and mean nothing: see `difference`."""
MARK = "*"
"""After a speed that was measured beside other work; `measured_on.other_work` says what it means."""


class Column(NamedTuple):
    """A column: one figure, or one text, of every row."""

    key: str  # in CSV, JSON, pandas and `plain_rows`
    heading: str = ""
    unit: str = ""  # after the heading of a table, or after the text of a detail; empty where one of these has it
    short: str = ""  # heading in a terminal, where it is another
    meaning: str = ""  # what the page says of a heading that is pointed at
    format: Callable[[Any], str] | None = None  # None: with its error, or as it is
    error: str = ""  # key of its standard error or deviation
    percent: bool = False  # whether it is a share, shown with its error in per cent
    interval: tuple[str, ...] = ()  # or keys of the ends of its interval, 95 %
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
        ends = [values[key] for key in self.interval if values.get(key) is not None]
        error = values.get(self.error) if self.error else None
        if error or (self.error and self.format is None):
            scale = 100 if self.percent else 1
            text = with_error(scale * value, scale * (error or 0.0)) + ("%" if self.percent else "")
        else:
            text = self.format(value) if self.format is not None else str(value)
        if self.format is not None and ends:
            text += f" ({' to '.join(self.format(end).removesuffix(' %') for end in ends)})"
        if self.timed and error == 0:
            text += " (one run)"
        return f"{text} {MARK}" if self.timed and (values.get("other_work_share") or 0.0) > OTHER_WORK else text
