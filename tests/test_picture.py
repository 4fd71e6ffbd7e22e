"""The picture of a comparison: every candidate that was measured is named in it, and what it was measured on."""

import random
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from polyquant.comparison.report.columns import AXES
from polyquant.comparison.report.names import NEAR, Box, placed
from polyquant.comparison.report.picture import HEIGHT, Point, draw, figure_of, points_of
from polyquant.comparison.result import read_comparison
from polyquant.errors import ConfigError

Text = pytest.importorskip("matplotlib.text", reason="matplotlib is not installed").Text
DATA = Path(__file__).parent / "data" / "comparison.json"
DOCS = Path(__file__).parent.parent / "docs" / "reference" / "comparison.json"


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


AREA = Box(0, 0, 560, 330)


def require_apart(names, area, marks=()):
    for index, name in enumerate(names):
        assert area.holds(name)
        for other in (*names[index + 1 :], *marks):
            assert name.apart(other)


@pytest.mark.parametrize("seed", range(20))
def test_every_name_has_a_place_of_its_own(seed):
    rng = random.Random(seed)
    middles = [(rng.uniform(0, 560), rng.uniform(0, 330)) for _ in range(rng.randint(1, 4))]
    points = [
        tuple(min(max(rng.gauss(at, 25), 0), most) for at, most in zip(rng.choice(middles), (560, 330), strict=True))
        for _ in range(rng.randint(1, 24))
    ]
    sizes = [(rng.uniform(30, 150), rng.choice((12, 24))) for _ in points]
    named = placed(points, sizes, AREA)
    assert named is not None
    require_apart([name.box for name in named], AREA, [Box.around(point, 12, 12) for point in points])
    for name, point in zip(named, points, strict=True):
        assert name.leader or name.box.way(point) <= NEAR + 1e-9


def test_names_without_room_are_not_placed():
    assert placed([(50, 50)], [(90, 12)], Box(0, 0, 100, 100)) is not None
    assert placed([(50, 50)], [(101, 12)], Box(0, 0, 100, 100)) is None
    assert placed([(50, 50)] * 2, [(90, 45)] * 2, Box(0, 0, 100, 100)) is None


def test_a_way_through_a_box():
    box = Box(0, 0, 10, 10)
    assert box.crossed((-5, 5), (20, 5)) and box.crossed((5, -5), (5, 20)) and box.crossed((-1, 3), (8, 12))
    assert (
        not box.crossed((-5, 11), (20, 11)) and not box.crossed((-5, 5), (-1, 5)) and not box.crossed((-9, 0), (0, 9))
    )


def many(comparison, seed):
    """A comparison of many candidates with long names, near to each other."""
    rng = random.Random(seed)
    row = next(row for row in comparison.rows if row.candidate.name == "bitsandbytes:nf4")

    def another(number):
        name = f"backend-{number}:" + rng.choice(("int4", "nf4,double_quant=true", "bits=3,group_size=64,skip=lm_head"))
        quality = msgspec.structs.replace(row.result.quality, kl_mean=10 ** rng.gauss(-1, 0.2))
        result = msgspec.structs.replace(row.result, quality=quality, stored_bytes=int(2**27 * rng.gauss(1, 0.02)))
        return msgspec.structs.replace(row, candidate=msgspec.structs.replace(row.candidate, name=name), result=result)

    return msgspec.structs.replace(comparison, rows=tuple(map(another, range(70))))


@pytest.mark.parametrize("against", ["memory", "speed"])
@pytest.mark.parametrize("which", ["data", "docs", "many"])
def test_no_name_is_over_another_or_outside(comparison, which, against):
    run = {"data": lambda: comparison, "docs": lambda: read_comparison(DOCS), "many": lambda: many(comparison, 1)}[
        which
    ]()
    figure = figure_of(run, against)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    labels = {point.label for point in points_of(run, next(column for column in AXES if column.goal == against))}
    names = [text for text in axes.texts if text.get_text().replace("\n", "") in labels]
    assert len(names) == len(labels)
    boxes = [Text.get_window_extent(name).extents for name in names]  # without the line
    require_apart([Box(*extent) for extent in boxes], Box(*axes.bbox.extents).grown(1))
    assert (figure.get_figheight() > HEIGHT) == (which == "many")


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
