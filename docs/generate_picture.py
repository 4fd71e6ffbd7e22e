"""The README's comparison: its picture and its table, from docs/reference/comparison.json.

`python docs/generate_picture.py FOLDER` takes a comparison that was measured, without what the docs do not show.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
from msgspec.structs import replace
from polyquant.comparison.records import Row
from polyquant.comparison.report.exports import as_markdown
from polyquant.comparison.report.picture import draw
from polyquant.comparison.result import Comparison, read_comparison

KEPT = Path(__file__).parent / "reference" / "comparison.json"


def picture_text() -> str:
    """The SVG."""
    with TemporaryDirectory() as folder:
        return draw(read_comparison(KEPT), Path(folder) / "comparison.svg").read_text(encoding="utf-8")


def comparison_table() -> str:
    """The Markdown table of the same."""
    return as_markdown(read_comparison(KEPT)).strip()


def kept(run: Comparison) -> Comparison:
    """Without its layers, what failed, and where it lay."""
    return replace(run, folder="", rows=tuple(_kept(row) for row in run.rows if row.status == "done"))


def _kept(row: Row) -> Row:
    assert row.result is not None  # it is done
    job = replace(row.result.job, reference="", model=row.result.job.model if "/" not in row.result.job.model else "")
    return replace(row, command="", result=replace(row.result, layers=(), job=job))


if __name__ == "__main__":
    KEPT.write_bytes(msgspec.json.format(msgspec.json.encode(kept(read_comparison(sys.argv[1]))), indent=1) + b"\n")
