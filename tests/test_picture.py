"""The picture of a comparison: every candidate that was measured is named in it, and what it was measured on."""

from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from polyquant.comparison.report.columns import AXES
from polyquant.comparison.report.picture import Point, _around, _Box, draw, points_of
from polyquant.comparison.result import read_comparison
from polyquant.errors import ConfigError

DATA = Path(__file__).parent / "data" / "comparison.json"


@pytest.fixture(scope="module")
def comparison():
    return read_comparison(DATA)


def words(svg):
    texts = (element for element in ElementTree.parse(svg).iter() if element.tag.endswith("text"))
    return [" ".join("".join(text.itertext()).split()) for text in texts]


@pytest.mark.parametrize("against", ["memory", "speed"])
def test_every_point_is_named_and_the_picture_says_what_was_measured(comparison, tmp_path, against):
    out = draw(comparison, tmp_path / "picture.svg", against)
    axis = next(column for column in AXES if column.goal == against)
    points = points_of(comparison, axis)
    assert len(points) > 3
    said = words(out)
    for point in points:
        assert point.label in said
    whole = " ".join(said)
    assert axis.axis in whole
    assert {"memory": "stored weights, MiB", "speed": "generated tokens/s"}[against] in said
    assert comparison.setting.model in whole
    assert comparison.machine.processor in whole
    assert comparison.created[:10] in whole
    assert "quark:int8 (check failed)" in said
    assert out.stat().st_size < 500_000


def test_points_are_the_figures_of_the_comparison(comparison):
    points = {point.label: point for point in points_of(comparison, AXES[0])}
    found = next(row.result for row in comparison.rows if row.candidate.name == "bitsandbytes:nf4")
    nf4 = points["bitsandbytes:nf4"]
    assert isinstance(nf4, Point)
    assert (nf4.x, nf4.y) == (found.memory.weights_stored_bytes / 2**20, found.quality.kl_mean)
    assert nf4.error == found.quality.kl_standard_error
    assert not [name for name in points if name.startswith("dense:float32")]  # the reference
    assert not points["quark:int8 (check failed)"].best


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_the_same_comparison_gives_the_same_file(comparison, tmp_path, suffix):
    one, two = (draw(comparison, tmp_path / f"{name}{suffix}").read_bytes() for name in ("one", "two"))
    assert one == two
    assert len(one) > 5000


def test_names_stand_where_they_cover_nothing():
    taken = _Box(0, 0, 10, 10)
    assert taken.covers(_Box(5, 5, 20, 20)) == 25
    assert taken.covers(_Box(10, 0, 20, 10)) == 0
    assert _Box.beside((5, 5), (2, 1), (8, 4)) == (7, 4, 15, 8)
    assert _Box(5, 5, 20, 20).outside(taken) == 200
    places = _around(40)
    assert places[0] == (9, 0)
    assert len(set(places)) == len(places)


def test_what_cannot_be_drawn_is_refused(comparison, tmp_path):
    with pytest.raises(ConfigError, match=r"\.svg, \.png, \.pdf, got 'picture.gif'"):
        draw(comparison, tmp_path / "picture.gif")
    empty = msgspec.structs.replace(comparison, rows=())
    with pytest.raises(ConfigError, match="nothing to draw"):
        draw(empty, tmp_path / "picture.svg")


def test_the_command_draws(tmp_path, run_python):
    result = run_python("report", str(DATA), "--picture", str(tmp_path / "a.svg"), "--out", str(tmp_path / "a.html"))
    assert result.returncode == 0, result.stderr
    assert f"wrote {tmp_path / 'a.svg'}" in result.stderr
    assert "hqq:int8" in words(tmp_path / "a.svg")
    two = run_python("report", str(DATA), str(DATA), "--picture", str(tmp_path / "b.svg"))
    assert (two.returncode, "draws one comparison" in two.stderr) == (2, True)
