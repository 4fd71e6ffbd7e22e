"""What `polyquant.compare` returns: the record of a comparison, with what one does with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from polyquant.comparison.choice import CONTEXT_TOKENS, best
from polyquant.comparison.records import Goal, Row, Run
from polyquant.comparison.report import measured_on
from polyquant.comparison.report.columns import COLUMNS, columns_of, shown
from polyquant.comparison.report.page import write_report
from polyquant.comparison.report.picture import Against, draw
from polyquant.comparison.report.rows import by_quality, first_line, plain_rows
from polyquant.errors import ConfigError, SaveError
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


def read_comparison(path: str | Path) -> Comparison:
    """The comparison in a folder or a comparison.json. Raises ConfigError where there is none that can be read."""
    file = Path(path)
    file = file / FILE if file.is_dir() else file
    try:
        return msgspec.json.decode(file.read_bytes(), type=Comparison)
    except OSError as error:
        raise ConfigError(f"{path} holds no comparison ({error}); make one with polyquant compare") from error
    except UNREADABLE as error:
        raise SaveError(f"{file} is damaged ({error}); run its polyquant compare again: no cell is lost") from error
