"""What `polyquant.compare` and `difference` return: the records, with what one does with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from polyquant.comparison.choice import CONTEXT_TOKENS, best
from polyquant.comparison.gate import GateResult, Limits, gate
from polyquant.comparison.records import Goal, Row, Run
from polyquant.comparison.report import measured_on
from polyquant.comparison.report.columns import COLUMNS, columns_of, shown
from polyquant.comparison.report.difference import Difference, compare_runs
from polyquant.comparison.report.difference_tables import sections, summary
from polyquant.comparison.report.page import write_difference, write_report
from polyquant.comparison.report.picture import Against, draw
from polyquant.comparison.report.rows import by_quality, first_line, plain_rows
from polyquant.errors import ConfigError
from polyquant.options import convert
from polyquant.support.shown import Look, Looked
from polyquant.types import UNREADABLE

FILE = "comparison.json"  # in the folder of a comparison


class Comparison(Looked, Run, frozen=True):
    """A whole comparison: its rows, what they were measured on, and what can be made of them."""

    def to_pandas(self) -> Any:
        """A pandas DataFrame, one row a candidate, the columns of the CSV file."""
        import pandas as pd

        return pd.DataFrame(plain_rows(self), columns=[column.key for column in columns_of(self)])

    def look(self) -> Look:
        columns = shown(columns_of(self), "terminal")
        rows = [
            (values["candidate"], *(column.text(values) for column in columns),
             "" if values["status"] == "done" else f"{values['status']}: {first_line(values['reason'])}")
            for values in by_quality(plain_rows(self))
        ]  # fmt: skip
        headings = [column.title for column in columns]
        return Look(measured_on.one_line(self), (COLUMNS[0].heading, *headings, ""), rows, self.notes)

    def best(
        self, goal: Goal = "quality", *, memory: int | str | None = None, kl: float | None = None,
        context_tokens: int = CONTEXT_TOKENS,
    ) -> Row:  # fmt: skip
        """The best candidate that was measured; see `polyquant.comparison.choice.best`."""
        return best(self, goal, memory=memory, kl=kl, context_tokens=context_tokens)

    def report(self, path: str | Path) -> Path:
        """Write the report as one HTML file that works offline, with CSV, JSON and Markdown beside it."""
        return write_report(self, Path(path))

    def picture(self, path: str | Path, against: Against = "memory") -> Path:
        """Write KL against bytes, or generated tokens a second, as .svg, .png or .pdf: see `report.picture`."""
        return draw(self, Path(path), against)

    def gate(
        self,
        *,
        max_kl: float | None = None,
        max_perplexity_ratio: float | None = None,
        min_top1: float | None = None,
        max_bytes: int | str | None = None,
        max_load_peak: int | str | None = None,
        max_run_peak: int | str | None = None,
        min_tokens_per_second: float | None = None,
        min_prompt_tokens_per_second: float | None = None,
        strict: bool = False,
        candidates: str | Sequence[str] = (),
        against: Run | str | Path | None = None,
    ) -> GateResult:
        """Hold candidates to limits, and to an earlier comparison: see `polyquant.comparison.gate`.

        A figure fails where its whole interval is beyond its limit; strict: where it is not whole within.
        candidates: names; empty: all but the reference. against: what is worse than there, beyond noise, fails.
        Raises ConfigError where there is nothing to judge or to judge by.
        """
        sizes = {"max_bytes": max_bytes, "max_load_peak": max_load_peak, "max_run_peak": max_run_peak}
        limits = {
            "max_kl": max_kl, "max_perplexity_ratio": max_perplexity_ratio, "min_top1": min_top1,
            "min_tokens_per_second": min_tokens_per_second,
            "min_prompt_tokens_per_second": min_prompt_tokens_per_second, "strict": strict,
            **{name: None if value is None else str(value) for name, value in sizes.items()},
        }  # fmt: skip
        names = (candidates,) if isinstance(candidates, str) else candidates
        earlier = against if against is None or isinstance(against, Run) else read_comparison(against)
        return gate(self, convert(Limits, limits), candidates=names, against=earlier)


class ComparisonDifference(Looked, Difference, frozen=True):
    """What changed from one comparison to another beyond noise: `changed`, and of it `worsened`."""

    def look(self) -> Look:
        rows = [
            (section["heading"], "  ".join(filter(None, row["cells"])))
            for section in sections(self) for row in section["rows"]
        ]  # fmt: skip
        return Look(summary(self), ("", ""), rows)

    def report(self, path: str | Path) -> Path:
        """Write the difference as one HTML file that works offline."""
        return write_difference(self, Path(path))


def difference(before: Run | str | Path, after: Run | str | Path) -> ComparisonDifference:
    """See `polyquant.difference`."""
    runs = [each if isinstance(each, Run) else read_comparison(each) for each in (before, after)]
    found = compare_runs(*runs)
    return ComparisonDifference(**{name: getattr(found, name) for name in Difference.__struct_fields__})


def read_comparison(path: str | Path) -> Comparison:
    """The comparison in a folder or a comparison.json. Raises ConfigError where there is none that can be read."""
    file = Path(path)
    file = file / FILE if file.is_dir() else file
    try:
        read = msgspec.json.decode(file.read_bytes(), type=Comparison)
    except OSError as error:
        raise ConfigError(f"{path} holds no comparison ({error}); make one with polyquant compare") from error
    except UNREADABLE as error:
        raise ConfigError(f"{file} is damaged ({error}); run its polyquant compare again: no cell is lost") from error
    return msgspec.structs.replace(read, folder=str(file.parent))  # it may have moved
