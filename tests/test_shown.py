"""What is returned looks like what it says, in a terminal and in a notebook: never thousands of characters of fields."""

from html.parser import HTMLParser
from pathlib import Path

import polyquant
from polyquant.comparison.result import read_comparison
from polyquant.isolated.doctor import Diagnoses, Diagnosis
from polyquant.registry.query import Miss, Selection
from polyquant.support.shown import Look
from polyquant.types import Problem

MOST = 12_000  # characters: a line for each preset of each backend
DATA = Path(__file__).parent / "data"
LINES = Look("two <b>", ("name", "why"), [("one", "a & b"), ("a longer one", "over\ntwo lines")], ["mind <this>"])


class Cells(HTMLParser):
    """The texts of the cells of a table, row by row; every element must be closed."""

    def __init__(self, html):
        super().__init__()
        self.open, self.rows, self.texts = [], [], []
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        else:
            self.texts.append(data)


def test_text_has_its_columns_below_each_other():
    assert LINES.text().splitlines() == [
        "two <b>",
        "  name          why",
        "  one           a & b",
        "  a longer one  over two lines",
        "  note: mind <this>",
    ]


def test_html_means_nothing_but_its_text():
    cells = Cells(LINES.html())
    assert cells.rows == [["name", "why"], ["one", "a & b"], ["a longer one", "over\ntwo lines"]]
    assert cells.texts == ["two <b>", "mind <this>"]
    assert Cells(Look("only this").html()).texts == ["only this"]


def looks(thing, *, rows=None):
    """The lines of a thing's repr; its HTML has the same cells."""
    text, cells = repr(thing), Cells(thing._repr_html_())
    assert len(text) <= MOST
    assert cells.texts[0] == text.splitlines()[0]
    if rows is not None:
        assert len(cells.rows) == rows + 1
        assert all(" ".join(cell.split("\n")) in text for row in cells.rows for cell in row)
    return text


def test_a_loaded_model_and_its_proof(tiny_model):
    loaded = polyquant.load(tiny_model("llama"), backend="bitsandbytes:nf4", kernel="packed")
    (first, *notes) = looks(loaded).splitlines()
    assert "llama with bitsandbytes (packed (" in first
    assert first.endswith("14 of 23 tensors in nf4"), first
    assert all("note: " in line for line in notes)
    settled = looks(loaded.settled)
    assert "on the fly, float32 on cpu, 23 tensors, BitsAndBytesOptions(" in settled
    report = polyquant.verify(loaded)
    assert "1.0 MiB, 0.39x bfloat16, verified" in looks(report, rows=len(report.checks))


def test_plans_have_a_line_for_each_candidate(tiny_model):
    plans = polyquant.plan(tiny_model("llama"), memory="8GiB")
    text = looks(plans, rows=len(plans.rows))
    assert f"{len(plans.fitting)} of {len(plans.rows)} fit 8.0 GiB" in text
    one = next(row for row in plans.rows if row.candidate.name == "bitsandbytes:nf4")
    assert "bitsandbytes:nf4" in text
    assert f"{one.plan.ratio:.2f}x" in text
    assert looks(one.plan).splitlines()[0].endswith("of 8.0 GiB: fits")
    assert (
        looks(polyquant.plan(tiny_model("llama"), "bitsandbytes:nf4", memory="1MiB"))
        .splitlines()[0]
        .endswith("of 1.0 MiB: does not fit")
    )
    found = polyquant.recommend(tiny_model("llama"), memory="8GiB")
    assert f"goal {found.goal}: {found.reason}" in looks(found, rows=8)
    assert "more are in `choices`" in repr(found)


def test_a_comparison_has_a_line_for_each_candidate():
    comparison = read_comparison(DATA / "comparison.json")
    text = looks(comparison, rows=len(comparison.rows))
    for row in comparison.rows:
        assert f"\n  {row.candidate.name} " in text
    assert comparison.setting.model in text.splitlines()[0]
    assert "KL (nats)" in text


def test_backends_and_what_stops_them():
    found = polyquant.backends()
    assert repr(found).startswith("Selection(")
    cells = Cells(found._repr_html_())
    assert [row[0] for row in cells.rows[1:]] == found.names
    assert "bits: 4" in Selection([], [Miss(name="acme", reasons=("bits: 4",))])._repr_html_()
    one = polyquant.doctor("bitsandbytes")
    assert looks(one, rows=1).startswith("1 of 1 backends run here")


def test_a_doctor_names_each_problem_with_its_cure():
    problems = [Problem(what="it is not there", fix="pip install it"), Problem(what="too old", fix="pip install newer")]
    found = Diagnoses([Diagnosis(backend="acme", origin="polyquant-x 1", device="cpu", problems=problems)])
    text = looks(found, rows=2)
    assert text.startswith("0 of 1 backends run here")
    assert "too old          pip install newer" in text
