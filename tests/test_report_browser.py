"""The report in a real browser, without a network: what it shows, what it does, and that it asks for nothing."""

import os
import re
import shutil
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from polyquant.comparison.records import Layer
from polyquant.comparison.report.page import write_report
from polyquant.comparison.result import Comparison

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
DATA = Path(__file__).parent / "data" / "comparison.json"
DOCUMENTED = Path(__file__).parent.parent / "docs" / "reference" / "comparison.json"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
HOSTILE = (
    "<b>bold</b><a href='https://example.org'>there</a></script><script>document.title = 'taken'</script>"
    "<img src=x onerror=\"document.title = 'taken'\">"
)


@pytest.fixture(scope="module")
def browser():
    found = os.environ.get("POLYQUANT_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the path, nor is POLYQUANT_BROWSER set")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def comparison():
    return msgspec.json.decode(DATA.read_bytes(), type=Comparison)


@pytest.fixture(scope="module")
def report(comparison, tmp_path_factory):
    return write_report(comparison, tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture
def opened(browser, report):
    """Opens a page that must stay silent: no message on the console, no error, no request but for the file itself."""
    contexts, heard = [], []

    def open_page(path=report, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: heard.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on(
            "request",
            lambda asked: asked.url == path.as_uri() or asked.url.startswith("data:") or heard.append(asked.url),
        )
        page.goto(path.as_uri())
        page.wait_for_selector("#plot .main-svg, #plot:not(:empty)")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert heard == []


def names(page):
    """Of the candidates shown, in their order."""
    return page.locator("#table tbody:visible th.name").evaluate_all("all => all.map((each) => each.dataset.value)")


def number_of_points(page):
    return page.locator("#plot .scatterlayer .points path").count()


def test_hovering_shows_the_name_and_the_figures(opened):
    page = opened()
    index = page.evaluate("data.points.findIndex((point) => point.candidate === 'gptq:int8')")
    box = page.evaluate(
        """(index) => {
            const {xaxis, yaxis} = document.getElementById("plot")._fullLayout, point = data.points[index];
            const area = document.querySelector("#plot .nsewdrag").getBoundingClientRect();
            return [area.x + xaxis.d2p(point.weights_stored_bytes / 2 ** 20), area.y + yaxis.d2p(point.kl_mean)];
        }""",
        index,
    )
    page.mouse.move(*box)
    hover = page.locator("#plot .hoverlayer .hovertext")
    hover.wait_for()
    assert "gptq:int8" in hover.text_content()
    assert "0.00193 ± 0.00008" in hover.text_content()
    page.mouse.click(*box)  # opens its row
    assert page.locator(f"#row-{index} .more").is_visible()


def test_the_plot_has_every_measured_candidate_and_its_frontier(opened, comparison):
    page = opened()
    assert number_of_points(page) == 10
    assert "hqq:int9 (failed)" in page.locator("#unplotted").text_content()
    by_size = page.locator("#frontier tbody th").all_text_contents()
    assert by_size == ["llama-cpp:Q4_0", "llama-cpp:Q8_0", "gptq:int8", "gguf:Q4_1"]
    page.get_by_label("generation speed").check()
    by_speed = page.locator("#frontier tbody th").all_text_contents()
    assert by_speed[-1] == "llama-cpp:Q4_0" and by_speed != by_size
    assert "generated tokens/s" in page.locator("#plot .xtitle").text_content()


RANDOM_LAYOUTS = """(count) => {
    let state = 1, wrong = [];
    const random = (most) => (state = (state * 48271) % 2147483647) / 2147483647 * most;
    const kinds = ["nf4", "nf4,double_quant=true", "bits=3,group_size=64,skip=lm_head", "a_word_without_any_sign_in_it_at_all_of_fifty_letters"];
    for (let layout = 0; layout < count; layout++) {
        const [width, height] = layout % 2 ? [300, 330] : [1140, 410], middles = Array.from({length: 1 + random(3)}, () => [random(width), random(height)]);
        const points = Array.from({length: 1 + random(layout % 2 ? 12 : 40)}, (_, index) => {
            const middle = middles[Math.floor(random(middles.length))];
            return {at: [width, height].map((most, side) => Math.min(most, Math.max(0, middle[side] + random(120) - 60))), bold: random(2) < 1,
                name: `backend-${index}:${kinds[Math.floor(random(kinds.length))]}`};
        });
        const marks = points.map((point) => point.at);
        let area = [width, height], places = null;
        while (!(places = placed(points, marks, [], area, 12, "sans-serif"))) { area = [width, area[1] * 1.2]; if (area[1] > 3000) break; }
        if (!places) { wrong.push([layout, "no places"]); continue; }
        places.forEach(({box, lines, leader}, index) => {
            if (box[0] < 0 || box[1] < 0 || box[2] > width || box[3] > area[1]) wrong.push([layout, "outside", points[index].name]);
            if (lines.join("") !== points[index].name) wrong.push([layout, "another name", lines]);
            if (!leader && Math.hypot(...nearest(box, points[index].at).map((end, side) => end - points[index].at[side])) > 14) wrong.push([layout, "far, without a line"]);
            for (const other of places.slice(index + 1)) if (!apart(box, other.box)) wrong.push([layout, "over another"]);
            for (const [x, y] of marks) if (!apart(box, [x - 6, y - 6, x + 6, y + 6])) wrong.push([layout, "over a mark"]);
        });
    }
    return wrong;
}"""
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


def test_names_of_random_layouts_cover_nothing(opened):
    assert opened().evaluate(RANDOM_LAYOUTS, 60) == []


def require_named(page):
    """Every point that is drawn has its name, as the browser drew it: inside the plot, and over no other."""
    wanted = page.evaluate("drawing.drawn.filter((point) => shown.has(point.index)).map((point) => point.candidate)")
    texts = page.locator("#plot .annotation-text").all_text_contents()
    assert len(texts) == len(wanted) and all(any(text.startswith(name) for text in texts) for name in wanted)
    boxes = page.locator("#plot .annotation-text").evaluate_all(
        "all => all.map((each) => each.getBoundingClientRect()).map(({left, top, right, bottom}) => [left, top, right, bottom])"
    )
    left, top, right, bottom = page.evaluate(
        "(({left, top, right, bottom}) => [left, top, right, bottom])(document.querySelector('#plot .nsewdrag').getBoundingClientRect())"
    )
    for index, box in enumerate(boxes):
        assert box[0] >= left - 2 and box[1] >= top - 2 and box[2] <= right + 2 and box[3] <= bottom + 2, texts[index]
        for other in boxes[index + 1 :]:
            assert (
                min(box[2], other[2]) - max(box[0], other[0]) < 1 or min(box[3], other[3]) - max(box[1], other[1]) < 2
            )


@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark"}, PHONE], ids=["desktop", "dark", "phone"])
def test_every_point_is_named(opened, comparison, tmp_path, options):
    measured = [row for row in comparison.rows if row.status == "done" and not comparison.is_reference(row)]
    crowd = tuple(
        replace(row, candidate=replace(row.candidate, name=f"{row.candidate.name},group_size={2**power},skip=lm_head"))
        for row in measured for power in range(3)
    )  # fmt: skip
    documented = msgspec.json.decode(DOCUMENTED.read_bytes(), type=Comparison)
    for run in (comparison, documented, replace(comparison, rows=crowd)):
        page = opened(write_report(run, tmp_path / "report.html"), **options)
        require_named(page)
        page.get_by_label("generation speed").check()
        require_named(page)
    page.get_by_label("Filter").fill("hqq")
    require_named(page)


def test_names_follow_the_view(opened):
    page = opened()
    before = page.locator("#plot .annotation-text").count()
    page.evaluate("Plotly.relayout('plot', {'xaxis.range': [Math.log10(200), Math.log10(300)]})")
    inside = page.evaluate("drawing.drawn.filter((point) => drawing.x(point) >= 200 && drawing.x(point) <= 300).length")
    assert page.locator("#plot .annotation-text").count() == inside < before


def test_headings_sort_both_ways_also_from_the_keyboard(opened, comparison):
    page = opened()
    assert names(page)[0] in ("dense:float32", "gguf:Q4_1")  # lowest KL
    assert names(page)[-2:] == ["hqq:int9", "awq:int4"]
    heading = page.locator("#table thead th", has_text="stored")
    heading.locator("button").click()
    stored = {
        row.candidate.name: row.result.stored_bytes or row.result.memory.weights_stored_bytes for row in comparison.done
    }

    def order():
        return [stored[name] for name in names(page) if name in stored]

    assert order() == sorted(stored.values())
    assert heading.get_attribute("aria-sort") == "ascending"
    heading.locator("button").focus()
    page.keyboard.press("Enter")
    assert order() == sorted(stored.values(), reverse=True)
    assert names(page)[-1] == "awq:int4"  # what is not measured stays last
    page.locator("#table thead th", has_text="candidate").locator("button").click()
    assert names(page) == sorted(names(page), key=str.lower)


def test_typing_filters_table_and_plot(opened):
    page = opened()
    page.get_by_label("Filter").type("hqq")
    assert set(names(page)) == {"hqq:int4", "hqq:int8", "hqq:int9"}
    assert page.locator("#shown").text_content() == "3 of 12 candidates"
    faded = page.evaluate(
        "[...document.querySelectorAll('#plot .scatterlayer .points path')].filter((each) => Number(each.style.opacity) < 0.2).length"
    )
    assert faded == 8
    page.get_by_label("Filter").fill("SIGKILL")
    assert names(page) == ["hqq:int9"]
    page.get_by_label("Filter").fill("")
    page.get_by_label("Backend").select_option("llama-cpp")
    assert set(names(page)) == {"llama-cpp:Q4_0", "llama-cpp:Q8_0"}
    page.get_by_label("Backend").select_option("")
    page.get_by_label("only the frontiers").check()
    assert "bitsandbytes:nf4" not in names(page) and "gptq:int8" in names(page)
    page.get_by_label("only the frontiers").uncheck()
    assert len(names(page)) == 12


def test_rows_open_and_commands_copy(opened):
    page = opened(permissions=["clipboard-read", "clipboard-write"])
    button = page.get_by_role("button", name="hqq:int4")
    assert button.get_attribute("aria-expanded") == "false"
    button.focus()
    page.keyboard.press("Enter")
    row = page.locator("tbody", has=page.locator("th[data-value='hqq:int4']"))
    assert button.get_attribute("aria-expanded") == "true"
    command = row.locator("code")
    assert command.text_content() == "polyquant compare builtin:smollm2 -c hqq:int4 --windows 4"
    row.get_by_role("button", name="copy").click()
    sync_api.expect(row.locator(".copy")).to_have_text("copied")
    assert page.evaluate("navigator.clipboard.readText()") == command.text_content()
    assert page.locator(".failures pre").text_content().splitlines()[0] == "loading"


def test_layers_of_each_candidate(opened, comparison):
    page = opened()
    chosen = page.locator("#layered")
    assert chosen.locator("option").all_text_contents() == ["hqq:int8", "bitsandbytes:nf4"]
    kinds = [f"self_attn.{kind}_proj" for kind in "qkvo"] + [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]
    assert sorted(page.locator("#heat .ytick text").all_text_contents()) == sorted(kinds)
    first = page.locator("#layer-summary").text_content()
    chosen.select_option(label="bitsandbytes:nf4")
    assert page.locator("#layer-summary").text_content() != first
    layers = next(row.result.layers for row in comparison.rows if row.candidate.name == "bitsandbytes:nf4")
    page.get_by_text("All tensors").click()
    assert page.locator("#tensors tbody tr").count() == len(layers)
    assert page.locator("#tensors tbody th").all_text_contents() == [layer.name for layer in layers]
    z = page.evaluate("document.getElementById('heat').data[0].z.flat().filter((each) => each !== null)")
    assert z == pytest.approx([layer.relative_error for layer in _by_kind(layers)], rel=1e-3)
    page.get_by_label("bits a weight").check()
    assert page.evaluate("document.getElementById('heat').data[0].z[0][0]") == pytest.approx(4.5, abs=0.01)


def _by_kind(layers):
    """In the order of the heat map: kinds as they come, each with its blocks."""
    inside = [(re.search(r"layers\.(\d+)\.(.+)\.weight", layer.name), layer) for layer in layers]
    kinds = list(dict.fromkeys(found[2] for found, _ in inside if found))
    return sorted(
        (layer for found, layer in inside if found),
        key=lambda layer: kinds.index(re.search(r"layers\.\d+\.(.+)\.weight", layer.name)[1]),
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_plot_are_readable_in_both_schemes(opened, scheme):
    page = opened(color_scheme=scheme)
    for selector, attribute in (
        ("h1", "color"),
        ("#plot .xtick text", "fill"),
        ("#plot .xtitle", "fill"),
        (".caption", "color"),
        ("#heat .ytick text", "fill"),
        (".reason p", "color"),
    ):
        style = f"getComputedStyle(document.querySelector({selector!r}))[{attribute!r}]"
        assert contrast(page.evaluate(style), page.evaluate("getComputedStyle(document.body).backgroundColor")) >= 4.5


def contrast(one, other):
    """Of two colours as CSS computes them, by WCAG 2."""

    def luminance(color):
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_on_a_phone_nothing_is_wider_than_the_screen(opened):
    page = opened(**PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("document.querySelector('#plot .main-svg').getBoundingClientRect().right") <= 390
    page.get_by_role("button", name="hqq:int4").tap()
    assert page.evaluate("document.querySelector('.more.shown .command').getBoundingClientRect().right") <= 390


def test_printing_is_light_and_has_every_command(opened, comparison):
    page = opened(color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(29, 33, 38)"
    assert page.locator("#table .command code:visible").count() == len(comparison.rows)
    assert not page.get_by_label("Filter").is_visible()
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")


def test_candidates_within_a_decade_have_figures_on_the_axis(opened, comparison, tmp_path):
    measured = [row for row in comparison.rows if row.result and row.result.quality]
    most = max(row.result.quality.kl_mean for row in measured)
    near = tuple(row for row in measured if row.result.quality.kl_mean > most / 5)
    page = opened(write_report(replace(comparison, rows=near), tmp_path / "near.html"))
    assert len(near) > 1 and page.locator("#plot .ytick text").count() > 1


def test_pages_of_odd_comparisons_stay_silent(opened, comparison, tmp_path):
    without = tuple(row.result and replace(row.result, quality=None, layers=()) for row in comparison.rows)
    speed_only = tuple(replace(row, result=result) for row, result in zip(comparison.rows, without))
    for rows, plotted in (((), False), (comparison.rows[-1:], False), (speed_only, False), (comparison.rows[:1], True)):
        page = opened(write_report(replace(comparison, rows=rows), tmp_path / "odd.html"))
        assert len(names(page)) == len(rows)
        page.get_by_label("generation speed").check()
        assert ("No candidate has both figures" not in page.locator("#plot").text_content()) == plotted


def test_whatever_data_says_is_shown_as_text(opened, comparison, tmp_path):
    first, *rest = comparison.rows
    layer = Layer(
        name=f"layers.0.{HOSTILE}",
        shape=(2, 2),
        bits=4,
        scheme=HOSTILE,
        stored_bytes=2,
        quantized=True,
        relative_error=0.1,
    )
    row = replace(
        rest[0], command=HOSTILE, candidate=replace(rest[0].candidate, name=HOSTILE),
        result=replace(rest[0].result, notes=(HOSTILE,), layers=(layer,), reason=HOSTILE),
    )  # fmt: skip
    failed = replace(rest[-2], result=replace(rest[-2].result, reason=f"{HOSTILE}\n{HOSTILE}"))
    page = opened(
        write_report(replace(comparison, rows=(first, row, failed), notes=(HOSTILE,)), tmp_path / "hostile.html")
    )
    page.get_by_label("generation speed").check()
    page.get_by_text("All tensors").click()
    assert page.title() == "builtin:smollm2: comparison"
    assert page.locator("img").count() == 0
    assert names(page)[1] == HOSTILE
    assert page.locator("#frontier tbody th").first.text_content() == HOSTILE
    assert page.locator("#tensors tbody th").first.text_content() == f"layers.0.{HOSTILE}"
    assert HOSTILE in page.locator("#plot .annotation-text").all_text_contents()
