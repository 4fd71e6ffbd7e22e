"""The report of a comparison: one HTML file that works offline, with CSV, JSON and Markdown beside it."""

from __future__ import annotations

import base64
import gzip
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from polyquant.comparison.records import Run
from polyquant.comparison.report import behaviour, difference_tables, measured_on, page_table
from polyquant.comparison.report.column import MARK
from polyquant.comparison.report.columns import AXES, columns_of
from polyquant.comparison.report.difference import Difference
from polyquant.comparison.report.exports import as_csv, as_markdown, as_plain
from polyquant.comparison.report.plot import FRONTIER, plot_data
from polyquant.errors import EnvironmentProblem
from polyquant.support.files import make_folder, write_atomically


def write_report(run: Run, path: Path) -> Path:
    """Write the report to `path`, and the same rows as CSV, JSON and Markdown beside it under the same name.

    path: the HTML file; a folder, or a name without a suffix, gets report.html in it. Returns the HTML file's path.
    Raises EnvironmentProblem where the extra `report` is not installed, after the other three are written; SaveError
    where the disk does not take them.
    """
    path = path if path.suffix else path / "report.html"
    make_folder(path.parent)
    plain = msgspec.json.format(msgspec.json.encode(as_plain(run)), indent=2).decode()
    for suffix, text in ((".csv", as_csv(run)), (".json", plain), (".md", as_markdown(run))):
        write_atomically(path.with_suffix(suffix), text)
    write_atomically(path, html(run))
    return path


def html(run: Run) -> str:
    """The page as text; it holds its scripts, and its content security policy forbids every request."""
    rows = page_table.rows_of(run)
    return _render(
        "report.html.j2",
        scripts=[_plotly(), "".join(_file(name) for name in ("labels.js", "plot.js", "table.js", "layers.js"))],
        setting=run.setting,
        version=run.version,
        created=run.created[:16].replace("T", " "),
        command=run.command,
        quality=measured_on.quality(run),
        machine=measured_on.short_machine(run.machine),
        all_notes=run.notes,
        mark=MARK,
        other_work=measured_on.other_work(run),
        axes=AXES,
        frontier=FRONTIER,
        figures=[column for column in columns_of(run) if column.meaning],
        headings=page_table.headings_of(run),
        rows=rows,
        open=any(row["status"] == "check failed" for row in rows),
        done=sum(row["status"] in ("done", "check failed") for row in rows),
        failed=[row for row in rows if row["status"] in ("failed", "check failed")],
        behaviour=behaviour.side_by_side(run),
        layered=[row for row in rows if row["layers"]],
        backends=sorted({row["backend"] for row in rows}),
        machines=measured_on.measurers(run),
        data=_packed(msgspec.json.encode(plot_data(run)).decode()),
    )


def write_difference(difference: Difference, path: Path) -> Path:
    """Write what changed between two comparisons as one HTML file without scripts."""
    make_folder(path.parent)
    page = _render(
        "difference.html.j2",
        scripts=[],
        before=difference.before,
        after=difference.after,
        summary=difference_tables.summary(difference),
        sections=difference_tables.sections(difference),
    )
    write_atomically(path, page)
    return path


def _render(template: str, *, scripts: list[str], **values: Any) -> str:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise _missing("jinja2") from error
    environment = Environment(
        loader=PackageLoader("polyquant.comparison.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    unpack = _file("unpack.js")
    page: str = environment.get_template(template).render(
        packed=[_packed(text) for text in scripts], unpack=Markup(unpack),  # noqa: S704  own files
        hashes=[_hash(text) for text in (unpack, *scripts)] if scripts else [],
        style=Markup(_file("report.css")), **values,  # noqa: S704
    )  # fmt: skip
    return page


@cache
def _packed(text: str) -> Any:
    """gzip as base 85 without <, which unpack.js reads: plotly alone is 4.8 MB, and 1.8 so."""
    from markupsafe import Markup

    return Markup(base64.b85encode(gzip.compress(text.encode(), mtime=0)).decode().replace("<", ","))  # noqa: S704


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise _missing("plotly") from error
    text: str = get_plotlyjs()
    return text


def _missing(library: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"the HTML report needs {library}, which is not installed: pip install 'polyquant[report]'; "
        "CSV, JSON and Markdown do not need it"
    )


def _file(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
