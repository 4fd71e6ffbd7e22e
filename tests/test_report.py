"""A comparison as rows, files, choices, differences and a page: on figures that were really measured (tests/data)."""

import base64
import gzip
import csv
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from polyquant.comparison.choice import USABLE_KL, best, frontier, needed_bytes
from polyquant.comparison.records import Layer, Result
from polyquant.comparison.report.columns import AXES, GOALS, KEYS, columns_of, shown
from polyquant.comparison.report.difference import compare_runs
from polyquant.comparison.report.exports import as_csv, as_markdown
from polyquant.comparison.report.formats import with_error
from polyquant.comparison.report.measured_on import one_line
from polyquant.comparison.report.page import html, write_difference, write_report
from polyquant.comparison.report.plot import frontiers, plot_data
from polyquant.comparison.report.rows import first_line, last_lines, plain_rows
from polyquant.comparison.result import Comparison
from polyquant.errors import ConfigError, PolyquantError
from polyquant.loading.records import Check
from polyquant.support.sizes import parse_size, size

DATA = Path(__file__).parent / "data" / "comparison.json"
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def comparison():
    return msgspec.json.decode(DATA.read_bytes(), type=Comparison)


def changed(comparison, name, **fields):
    """The comparison with other fields in the result of one row."""
    return replace(
        comparison,
        rows=tuple(
            replace(row, result=replace(row.result, **fields)) if row.candidate.name == name else row
            for row in comparison.rows
        ),
    )


def result(comparison, name) -> Result:
    return next(row.result for row in comparison.rows if row.candidate.name == name)


def test_rows_have_every_column_and_say_what_became_of_them(comparison):
    table = {cell["candidate"]: cell for cell in plain_rows(comparison)}
    assert all(list(KEYS) == list(cell)[: len(KEYS)] for cell in table.values())
    assert {name: cell["status"] for name, cell in table.items() if cell["status"] != "done"} == {
        "quark:int8": "check failed", "hqq:int9": "failed", "awq:int4": "missing",
    }  # fmt: skip
    nf4, found = table["bitsandbytes:nf4"], result(comparison, "bitsandbytes:nf4")
    assert nf4["kl_mean"] == found.quality.kl_mean
    assert nf4["perplexity_ratio"] == found.quality.perplexity / found.quality.reference_perplexity
    assert nf4["weights_stored_bytes"] == found.memory.weights_stored_bytes
    assert nf4["ratio_to_bfloat16"] == pytest.approx(found.memory.ratio_to_bfloat16)
    assert nf4["generated_tokens_per_second"] == found.speed.generated_tokens_per_second.mean
    assert table["dense:float32"]["ratio_to_bfloat16"] == pytest.approx(2, abs=1e-3)
    assert table["hqq:int8"]["gutenberg_acc"] == 0.61
    assert table["hqq:int9"]["kl_mean"] is None
    assert "61.2%" in table["quark:int8"]["reason"]


def test_every_column_is_declared_once_and_can_be_shown_where_it_appears(comparison):
    declared = columns_of(comparison)
    keys = [column.key for column in declared]
    assert len(set(keys)) == len(keys)
    assert {column.error for column in declared if column.error} <= set(keys)
    assert all(column.heading for column in declared if column.places)
    assert all(column.error for column in declared if column.noise in ("standard error", "standard deviation"))
    assert list(GOALS) == ["quality", "memory", "speed"] and [column.key for column in AXES] == [
        "weights_stored_bytes", "generated_tokens_per_second", "prompt_tokens_per_second",
    ]  # fmt: skip
    (nf4,) = (values for values in plain_rows(comparison) if values["candidate"] == "bitsandbytes:nf4")
    assert [column.text(nf4) for column in shown(declared, "terminal")] == [
        "0.249 ± 0.008", "70.1 ± 1.4%", "165.1 MiB", "28.90 ± 0.02",
    ]  # fmt: skip
    assert [column.text({}) for column in declared] == [""] * len(declared)


def test_csv_json_and_pandas_hold_the_same(comparison, tmp_path):
    written = write_report(comparison, tmp_path / "new" / "report.html")
    names = [column.key for column in columns_of(comparison)]
    assert names[-2:] == ["gutenberg_acc", "gutenberg_acc_standard_error"]
    lines = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    plain = json.loads(written.with_suffix(".json").read_text())
    frame = pandas.read_csv(written.with_suffix(".csv"))
    assert list(lines[0]) == list(frame.columns) == names
    assert [line["candidate"] for line in lines] == [row["candidate"] for row in plain["rows"]]
    assert [float(line["kl_mean"] or "nan") for line in lines] == pytest.approx(
        [math.nan if row["kl_mean"] is None else row["kl_mean"] for row in plain["rows"]], nan_ok=True
    )
    direct = comparison.to_pandas()
    assert set(KEYS) <= set(direct.columns)
    assert direct["kl_mean"].to_list() == pytest.approx(frame["kl_mean"].to_list(), nan_ok=True)
    assert plain["setting"]["model"] == "builtin:smollm2"


def test_markdown_is_aligned_and_says_what_it_was_measured_on(comparison):
    text = as_markdown(changed(comparison, "hqq:int9", reason="died: a|b <b>\nlast words"))
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({len(line) for line in table}) == 1
    assert len(table) == 2 + 10  # ten measured
    assert table[2].startswith("| dense:float32") and "\\< 1e-6" in table[2]
    assert "- hqq:int9 (failed): died: a\\|b \\<b\\>\n" in text
    assert one_line(comparison) in text
    assert "llamacpp-512, 4 windows, 1020 tokens scored" in one_line(comparison)
    assert "Note: builtin:smollm2 was 4-bit once already" in text


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (0.24866, 0.00776, "0.249 ± 0.008"),
        (10.21655, 0.10767, "10.22 ± 0.11"),
        (0.000743, 0.00003, "0.00074 ± 0.00003"),
        (505.6, 44.8, "506 ± 45"),
        (-5e-10, 6e-9, "< 1e-6"),
        (6.77, 0.0, "6.77"),
        (1475.2, None, "1475"),
    ],
)
def test_figures_have_the_digits_their_error_leaves(value, error, words):
    assert with_error(value, error) == words


def test_every_figure_says_its_error_or_that_it_is_one_run(comparison):
    found = result(comparison, "bitsandbytes:nf4")
    once = replace(found.speed.generated_tokens_per_second, standard_deviation=0.0, repetitions=(28.9,))
    run = changed(
        comparison, "bitsandbytes:nf4", quality=replace(found.quality, perplexity_ratio_standard_error=0.012),
        speed=replace(found.speed, generated_tokens_per_second=once),
    )  # fmt: skip
    (values,) = (values for values in plain_rows(run) if values["candidate"] == "bitsandbytes:nf4")
    said = {column.key: column.text(values) for column in columns_of(run)}
    assert said["perplexity_ratio"] == f"{found.quality.perplexity_ratio:.3f} ± 0.012"
    assert " ± " in said["perplexity"] and " ± " in said["top1"] and " ± " in said["first_token_seconds"]
    assert said["generated_tokens_per_second"].startswith("28.9 (one run)")
    assert "one run" not in said["prompt_tokens_per_second"]
    page = html(run)
    assert all(column.meaning in page for column in columns_of(run) if column.meaning and "'" not in column.meaning)


def test_a_reason_and_what_was_said_last():
    reason = "killed by signal 9; it said last:\n  loading\n    layer 3"
    assert first_line(reason) == "killed by signal 9"
    assert last_lines(reason) == "loading\n  layer 3"


def test_sizes():
    assert parse_size("6GiB") == parse_size("6 GiB") == parse_size(6 * 2**30) == parse_size(str(6 * 2**30)) == 6 * 2**30
    assert (parse_size("500MB"), size(parse_size("1.5GiB")), size(None)) == (500_000_000, "1.5 GiB", "not measured")
    for wrong in ("6G", "-1GiB", "nanGiB", "infGiB", "", 0):
        with pytest.raises(ConfigError, match="size"):
            parse_size(wrong)


@given(st.lists(st.one_of(st.none(), st.tuples(st.integers(0, 9), st.integers(0, 9)))))
def test_the_frontier_is_what_nothing_beats(points):
    chosen = [points[index] for index in frontier(points)]
    assert chosen == sorted(chosen)
    for point in filter(None, points):
        beaten = [other for other in chosen if other[0] <= point[0] and other[1] <= point[1]]
        assert beaten == [point] if point in chosen else beaten


def test_the_frontier_of_speed_wants_more_and_leaves_out_what_failed(comparison):
    found = frontiers(comparison)
    names = {axis: [comparison.rows[index].candidate.name for index in line] for axis, line in found.items()}
    assert names["weights_stored_bytes"] == ["llama-cpp:Q4_0", "llama-cpp:Q8_0", "gptq:int8", "gguf:Q4_1"]
    assert names["generated_tokens_per_second"][-1] == "llama-cpp:Q4_0"  # the fastest
    assert not {"dense:float32", "quark:int8", "hqq:int9", "awq:int4"} & {
        name for line in names.values() for name in line
    }


def test_best_for_a_goal_and_a_budget(comparison):
    chosen = {goal: comparison.best(goal).candidate.name for goal in ("quality", "speed", "memory")}
    assert chosen == {"quality": "gguf:Q4_1", "speed": "llama-cpp:Q4_0", "memory": "llama-cpp:Q4_0"}
    assert comparison.best(memory="200MiB").candidate.name == "llama-cpp:Q8_0"  # gptq:int8 is smaller without its cache
    row = next(row for row in comparison.rows if row.candidate.name == "gptq:int8")
    memory = row.result.memory
    assert needed_bytes(row, comparison, 10) == memory.weights_stored_bytes + 10 * memory.kv_cache_bytes_per_token
    assert best(comparison, memory=needed_bytes(row, comparison, 0), context_tokens=0) == row
    assert best(comparison, "speed", kl=0.01).candidate.name == "llama-cpp:Q8_0"


def test_the_reference_is_no_candidate_however_it_is_written(comparison):
    named = replace(comparison, setting=replace(comparison.setting, reference="dense"))
    assert frontiers(named) == frontiers(comparison)
    assert named.best().candidate.name == "gguf:Q4_1"
    other = replace(comparison, setting=replace(comparison.setting, reference="dense:bfloat16"))
    assert other.rows[frontiers(other)["generated_tokens_per_second"][0]].candidate.name == "dense:float32"


def test_best_never_takes_what_failed_or_is_unusable(comparison):
    best_of_all = changed(
        comparison, "gguf:Q4_1", checks=(Check(name="coverage", passed=False, expected="a", found="b"),)
    )
    assert best_of_all.best().candidate.name == "hqq:int8"
    fast = result(comparison, "llama-cpp:Q4_0")
    broken = changed(comparison, "llama-cpp:Q4_0", quality=replace(fast.quality, kl_mean=USABLE_KL + 0.1))
    assert broken.best("speed").candidate.name == "llama-cpp:Q8_0"


def test_best_names_the_nearest_where_nothing_fits(comparison):
    with pytest.raises(PolyquantError, match=r"fits into 95.4 MiB .*nearest is llama-cpp:Q4_0, which needs 130.8 MiB"):
        comparison.best(memory="100MB")
    with pytest.raises(PolyquantError, match=r"within 1e-09 nats .* nearest is gguf:Q4_1"):
        best(
            changed(comparison, "gguf:Q4_1", quality=replace(result(comparison, "gguf:Q4_1").quality, kl_mean=1e-8)),
            kl=1e-9,
        )
    with pytest.raises(ConfigError, match=r"one of quality, speed, memory, got 'sped'. Did you mean 'speed'"):
        comparison.best("sped")
    with pytest.raises(PolyquantError, match="no candidate of comparison was measured"):
        replace(comparison, rows=comparison.rows[-2:]).best()


def test_nothing_differs_from_itself(comparison):
    found = compare_runs(comparison, comparison)
    assert len(found.changes) > 40
    assert (found.changed, found.other_changes, found.conditions, found.worsened) == ([], (), (), [])


def test_a_difference_tells_changes_from_noise(comparison):
    quality = result(comparison, "bitsandbytes:nf4").quality
    noise = 3 * math.sqrt(2) * quality.kl_standard_error

    def with_kl(more):
        new = replace(quality, kl_mean=quality.kl_mean + more)
        return compare_runs(comparison, changed(comparison, "bitsandbytes:nf4", quality=new)).changed

    assert with_kl(0.99 * noise) == []
    (change,) = with_kl(1.01 * noise)
    assert (change.candidate, change.figure, change.worse) == ("bitsandbytes:nf4", "kl_mean", True)
    (change,) = with_kl(-1.01 * noise)
    assert not change.worse

    memory = result(comparison, "hqq:int4").memory
    one_more = replace(memory, weights_stored_bytes=memory.weights_stored_bytes + 1)
    (change,) = compare_runs(comparison, changed(comparison, "hqq:int4", memory=one_more)).changed
    assert (change.figure, change.after - change.before, change.noise) == ("weights_stored_bytes", 1, 0)

    speed = result(comparison, "hqq:int4").speed

    def with_speed(factor):
        rate = replace(speed.generated_tokens_per_second, mean=factor * speed.generated_tokens_per_second.mean)
        return compare_runs(
            comparison, changed(comparison, "hqq:int4", speed=replace(speed, generated_tokens_per_second=rate))
        )

    assert with_speed(0.97).changed == []
    assert [change.figure for change in with_speed(0.8).worsened] == ["generated_tokens_per_second"]


def test_a_difference_names_what_was_not_alike(comparison):
    def elsewhere(row):
        machine = replace(
            row.result.machine, processor="another", versions={**row.result.machine.versions, "torch": "3.0"}
        )
        speed = row.result.speed and replace(
            row.result.speed,
            generated_tokens_per_second=replace(row.result.speed.generated_tokens_per_second, mean=0.1),
        )
        return replace(row, result=replace(row.result, machine=machine, speed=speed))

    there = replace(
        comparison, rows=tuple(elsewhere(row) if row.result and row.result.machine else row for row in comparison.rows)
    )
    found = compare_runs(comparison, replace(there, setting=replace(there.setting, windows=8)))
    said = {condition.name: (condition.before, condition.after) for condition in found.conditions}
    assert said["torch"] == ("2.13.0+cpu", "3.0")
    assert said["windows"] == ("4", "8")
    assert "another" in said["machine"][1]
    assert found.changed and not found.worsened  # slower, on another machine
    assert "kl_mean" in {change.figure for change in found.changes}
    other = compare_runs(comparison, replace(comparison, setting=replace(comparison.setting, preset="gptq-2048")))
    assert not {"kl_mean", "top1"} & {change.figure for change in other.changes}  # another convention: not comparable


def test_a_difference_tells_new_failures_and_what_is_only_in_one(comparison):
    after = changed(comparison, "hqq:int4", status="failed", reason="gone", quality=None, speed=None)
    after = changed(after, "gptq:int8", checks=(Check(name="coverage", passed=False, expected="95%", found="80%"),))
    last = after.rows[-1]
    renamed = replace(last, candidate=replace(last.candidate, name="new:int4", backend="new"))
    found = compare_runs(comparison, replace(after, rows=(*after.rows[1:-1], renamed)))
    changes = {
        (change.candidate, change.what): (change.before, change.after) for change in found.other_changes if change.worse
    }
    assert changes == {
        ("hqq:int4", "status"): ("done", "failed"),
        ("gptq:int8", "status"): ("done", "check failed"),
        ("gptq:int8", "check coverage"): ("passed", "failed: 80%"),
    }
    assert (found.only_before, found.only_after) == (("dense:float32", "awq:int4"), ("new:int4",))
    same = replace(last, candidate=replace(last.candidate, name="the same, named otherwise"))
    assert compare_runs(comparison, replace(comparison, rows=(*comparison.rows[:-1], same))).only_after == ()


class Page(HTMLParser):
    """Attributes that load or lead somewhere, the scripts, and the policy."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.scripts, self.policy, self.tags, self.inside = [], [], "", [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.addresses += [values[name] for name in ("src", "href", "action", "data", "srcset") if name in values]
        self.policy = values.get("content", "") if values.get("http-equiv") else self.policy
        self.inside = tag == "script" and values.get("type", "text/plain") == "text/plain"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, text):
        if self.inside:
            self.scripts[-1] += text


def test_the_page_leads_nowhere_and_runs_its_own_scripts_only(comparison):
    text = html(comparison)
    page = Page(text)
    assert page.addresses and all(address.startswith("#") for address in page.addresses)
    assert not re.search(r"url\((?!data:)", text[: text.index("</style>")])
    assert "default-src 'none'" in page.policy
    *packed, unpack = page.scripts
    scripts = [gzip.decompress(base64.b85decode(each.replace(",", "<"))).decode() for each in packed]
    hashes = [
        "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in (*scripts, unpack)
    ]
    assert len(hashes) == 3 and all(f"'{each}'" in page.policy for each in hashes)
    assert page.policy.count("'sha256-") == 3
    assert len(text) - max(map(len, page.scripts)) < 200_000  # plotly's script is the only large part
    assert len(text.encode()) < 2_000_000


def test_a_page_with_every_layer_of_many_candidates_is_small(comparison):
    (row,) = (row for row in comparison.rows if row.candidate.name == "hqq:int8")
    row = replace(row, result=replace(row.result, layers=row.result.layers * 12))
    many = [replace(row, candidate=replace(row.candidate, name=f"hqq:int8-{number}")) for number in range(12)]
    assert len(html(replace(comparison, rows=tuple(many))).encode()) < 2_000_000


def test_whatever_data_says_stays_text(comparison):
    hostile = changed(comparison, "hqq:int9", reason=f"{HOSTILE}\n{HOSTILE}", notes=(HOSTILE,))
    layer = Layer(
        name=HOSTILE, shape=(2, 2), bits=4, scheme=HOSTILE, stored_bytes=2, quantized=True, relative_error=0.1
    )
    hostile = changed(hostile, "hqq:int8", kernel=HOSTILE, layers=(layer,))
    first = hostile.rows[0]
    named = replace(first, command=HOSTILE, candidate=replace(first.candidate, name=HOSTILE, options={"a": HOSTILE}))
    hostile = replace(
        hostile, rows=(named, *hostile.rows[1:]), notes=(HOSTILE,), setting=replace(hostile.setting, model=HOSTILE)
    )
    page = Page(html(hostile))
    plain = Page(html(comparison))
    assert "img" not in page.tags
    assert page.tags.count("script") == plain.tags.count("script") == 4
    assert page.scripts == plain.scripts


def test_the_page_says_what_the_records_say(comparison):
    text = html(comparison)
    for words in (
        "10 of 12 candidates measured",
        "killed by signal 9 (SIGKILL), most likely for lack of memory",
        "quantizing layer 12 of 210",
        "polyquant compare builtin:smollm2 -c hqq:int4 --windows 4",
        "builtin:smollm2 was 4-bit once already",
        "on this CPU the first forward pass repacks 4-bit weights",
        "transformers 5.23.0",
        "0.249 ± 0.008",
        "not measured yet",
    ):
        assert words in text, words


def test_layers_are_stored_once_for_all_candidates(comparison):
    layers = plot_data(comparison)["layers"]
    assert len(layers["of"]) == 2 and len(layers["names"]) == 1
    nf4 = next(index for index, row in enumerate(comparison.rows) if row.candidate.name == "bitsandbytes:nf4")
    packed = layers["of"][nf4]
    for index, layer in enumerate(comparison.rows[nf4].result.layers):
        assert layers["names"][packed["names"]][index] == layer.name
        assert layers["schemes"][packed["schemes"][index]] == layer.scheme
        assert packed["bits"][index] == pytest.approx(8 * layer.stored_bytes / math.prod(layer.shape), abs=1e-3)
        assert packed["errors"][index] == (layer.relative_error and pytest.approx(layer.relative_error, rel=1e-3))


def test_pages_of_odd_comparisons(comparison, tmp_path):
    speed_only = replace(
        comparison,
        rows=tuple(
            replace(row, result=row.result and replace(row.result, quality=None, layers=())) for row in comparison.rows
        ),
        notes=(),
    )
    for odd in (replace(comparison, rows=()), replace(comparison, rows=comparison.rows[-1:]), speed_only):
        assert write_report(odd, tmp_path / "odd.html").stat().st_size > 1_000_000
        assert "This run recorded no layers" in (tmp_path / "odd.html").read_text()


def test_the_page_of_a_difference(comparison, tmp_path):
    after = changed(comparison, "hqq:int4", status="failed", reason=HOSTILE, quality=None, speed=None)
    page = Page(write_difference(compare_runs(comparison, after), tmp_path / "d.html").read_text())
    assert page.scripts == [] and page.addresses == [] and "script-src 'none'" in page.policy


def test_without_the_extra_the_rest_is_there_and_the_error_says_what_to_install(run_python, tmp_path):
    (tmp_path / "comparison.json").write_bytes(DATA.read_bytes())
    result = run_python(
        code="import sys; sys.modules['plotly'] = sys.modules['plotly.offline'] = None\n"
        f"sys.argv = ['polyquant', 'report', {str(tmp_path)!r}]\nimport polyquant.__main__"
    )
    assert (result.returncode, "Traceback" in result.stderr) == (1, False)
    assert "needs plotly, which is not installed: pip install 'polyquant[report]'" in result.stderr
    assert "0.249 ± 0.008" in result.stdout
    assert {path.name for path in tmp_path.glob("report.*")} == {"report.csv", "report.json", "report.md"}


def test_command_shows_and_writes(run_python, tmp_path):
    (tmp_path / "comparison.json").write_bytes(DATA.read_bytes())
    result = run_python("report", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "0.249 ± 0.008" in result.stdout
    assert "failed hqq:int9: killed by signal 9" in result.stdout
    assert {"report.html", "report.csv", "report.json", "report.md"} <= {path.name for path in tmp_path.iterdir()}
    printed = json.loads(run_python("report", str(DATA), "--json").stdout)
    assert printed == json.loads((tmp_path / "report.json").read_text())
    assert not list(DATA.parent.glob("report.*"))


def test_command_compares_two(run_python, tmp_path, comparison):
    after = changed(comparison, "hqq:int4", status="failed", reason="gone", quality=None, speed=None)
    (tmp_path / "comparison.json").write_text(after.to_json())
    result = run_python("report", str(DATA), str(tmp_path), "--out", str(tmp_path / "d.html"))
    assert result.returncode == 1, result.stderr
    assert re.search(r"hqq:int4 +status +done +failed", result.stdout)
    assert (tmp_path / "d.html").exists()
    printed = json.loads(run_python("report", str(DATA), str(tmp_path), "--json").stdout)
    assert [turn["candidate"] for turn in printed["worsened"]] == ["hqq:int4"]
    same = run_python("report", str(DATA), str(DATA))
    assert (same.returncode, "nothing changed beyond noise" in same.stdout) == (0, True)


def test_command_on_what_is_no_comparison(run_python, tmp_path):
    for content in (None, "", "{}", "[1]", "[" * 100_000):
        if content is not None:
            (tmp_path / "comparison.json").write_text(content)
        result = run_python("report", str(tmp_path))
        assert (result.returncode, "Traceback" in result.stderr) == (2, False)
        assert "polyquant compare" in result.stderr
