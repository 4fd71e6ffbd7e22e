"""Speeds that are measured beside other work on the same cores: seen, kept, marked wherever they are shown."""

import io
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from time import sleep

import msgspec
import polyquant
import psutil
import pytest
from msgspec.structs import replace
from polyquant.cli.progress import RowLines, RowTable
from polyquant.cli.terminal import Terminal
from polyquant.comparison.records import OTHER_WORK, Result
from polyquant.comparison.report.columns import COLUMNS, SPEEDS
from polyquant.comparison.report.difference import compare_runs
from polyquant.comparison.report.exports import as_csv, as_markdown, as_plain
from polyquant.comparison.report.measured_on import other_work
from polyquant.comparison.report.page import html
from polyquant.comparison.report.rows import plain_rows
from polyquant.comparison.result import Comparison
from polyquant.comparison.store import joined
from polyquant.support.machine import usable_cores
from polyquant.support.other_work import LEAST_SECONDS, OtherWork, _read
from polyquant.testing.models import tiny_model
from rich.live import Live

DATA = Path(__file__).parent / "data" / "comparison.json"
SPIN = "import os\nwhile os.getppid() == {parent}: sum(range(10000))"
IDLE = 0.03  # of the cores, what others may take for a machine to count as idle
SEEN = "bitsandbytes:nf4"


@contextmanager
def working(processes):
    """So many processes that keep a core busy each."""
    import os

    code = SPIN.format(parent=os.getpid())
    busy = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(processes)]
    try:
        yield busy
    finally:
        for process in busy:
            process.kill()
            process.wait()


def require_idle():
    """Skips a test that needs the cores alone where something else uses them all the while."""
    for _ in range(5):
        if psutil.cpu_percent(LEAST_SECONDS) < 100 * IDLE:
            return
    pytest.skip("other work is going on here")


def timed(seconds, cores=1):
    others = OtherWork()
    sleep(seconds)
    return others.share(cores)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model("llama", tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def comparison():
    """One that was written before other work was looked at."""
    return msgspec.json.decode(DATA.read_bytes(), type=Comparison)


@pytest.fixture
def marked(comparison):
    def with_share(row):
        return replace(row, result=replace(row.result, other_work_share=0.4)) if row.candidate.name == SEEN else row

    return replace(comparison, rows=tuple(map(with_share, comparison.rows)))


def measured(model, out, progress=None):
    """The cell of one candidate, timed in a process of its own."""
    how = {"parts": ("speed",), "device": "cpu", "speed_limit_seconds": 2}
    (row,) = polyquant.compare(model, ["dense:float32"], out=out, progress=progress, **how).rows
    return row


# seen


def test_what_a_process_starts_is_its_own_work():
    with working(1) as (child,):
        began, used = _read(), sum(psutil.Process(child.pid).cpu_times()[:2])
        sleep(2)
        now, used = _read(), sum(psutil.Process(child.pid).cpu_times()[:2]) - used
    assert used > 0.1
    assert now.own - began.own == pytest.approx(used, abs=0.1)
    assert now.busy - began.busy >= used - 0.1
    assert now.passed - began.passed == pytest.approx((now.clock - began.clock) * len(usable_cores()), rel=0.1)


def test_too_little_time_says_nothing():
    assert timed(LEAST_SECONDS / 10) is None


def test_counters_that_stand_still_say_nothing(monkeypatch):
    before = psutil.cpu_times(percpu=True)
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: before)
    assert timed(LEAST_SECONDS * 1.1) is None


def test_a_system_that_does_not_say_is_not_known(monkeypatch):
    def denied(percpu):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "cpu_times", denied)
    assert timed(LEAST_SECONDS * 1.1) is None


def test_a_cell_beside_busy_processes_is_marked(model, tmp_path, capfd):
    with working(len(usable_cores())):
        row = measured(model, tmp_path / "out", RowLines())
    share = row.result.other_work_share
    assert share > 0.2, "as many others as cores take about half"
    assert row.result.beside_other_work
    said = capfd.readouterr().err
    assert f"dense:float32: other work took {share:.0%} of the cores while speed was measured" in said
    kept = polyquant.read_comparison(tmp_path / "out").rows[0].result
    assert kept.other_work_share == share


def test_a_cell_that_is_alone_is_not_marked(model, tmp_path, capfd):
    require_idle()
    row = measured(model, tmp_path / "out", RowLines())
    require_idle()
    assert row.result.other_work_share < OTHER_WORK
    assert not row.result.beside_other_work
    assert "other work" not in capfd.readouterr().err


# shown


def test_results_of_before_are_read_and_say_nothing(comparison):
    assert all(row.result.other_work_share is None for row in comparison.rows if row.result)
    assert other_work(comparison) == ""
    assert "other work" not in as_markdown(comparison) + html(comparison).partition('id="data"')[0]
    assert as_plain(comparison)["notes"] == list(comparison.notes)


def test_speeds_are_marked_in_tables_and_the_page_and_named_in_all(marked):
    values = {row["candidate"]: row for row in plain_rows(marked)}
    shown = {column.key: column for column in COLUMNS}
    for key in (*(column.key for column in SPEEDS), "first_token_seconds"):
        assert shown[key].text(values[SEEN]).endswith(" *"), key
        assert not any(shown[key].text(row).endswith("*") for name, row in values.items() if name != SEEN), key
    assert not shown["kl_mean"].text(values[SEEN]).endswith("*")
    assert values[SEEN]["other_work_share"] == 0.4
    said = other_work(marked)
    assert said.startswith(f"speed was measured beside other work, which took this much of the cores: {SEEN} (40%); ")
    markdown = as_markdown(marked)
    assert f"\\* {said}." in markdown
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {SEEN} ")]
    assert line.count(" \\* |") == 2
    page = html(marked).partition('id="data"')[0]
    assert page.count(f'<span aria-hidden="true">*</span> {said}') == 2
    assert page.count(" *</td>") == 2
    assert said in as_plain(marked)["notes"]
    assert ",other_work_share," in as_csv(marked).splitlines()[0]


def test_the_terminal_says_it(marked, capsys):
    from polyquant.cli.reporting import show_comparison

    show_comparison(marked)
    said = " ".join(capsys.readouterr().out.split())
    assert f"* {other_work(marked)}" in said


def test_the_table_of_a_running_comparison_says_it(marked):
    terminal = Terminal(stderr=True)
    terminal.file = text = io.StringIO()
    with Live(console=terminal, transient=True) as display:
        table = RowTable(display)
        table.begin([replace(row, result=None) for row in marked.rows])
        for row in marked.rows:
            table.finish(row)
    said = f"{SEEN}: other work took 40% of the cores while speed was measured"
    assert " ".join(text.getvalue().split()).count(said) == 1


def test_little_is_no_mark(comparison):
    row = replace(comparison.rows[0], result=replace(comparison.rows[0].result, other_work_share=OTHER_WORK))
    assert other_work(replace(comparison, rows=(row,))) == ""


def test_a_difference_says_that_the_two_were_not_measured_alike(comparison, marked):
    difference = compare_runs(comparison, marked)
    (condition,) = [each for each in difference.conditions if each.name == "other work"]
    changes = {change.candidate: {} for change in difference.changes}
    for change in difference.changes:
        changes[change.candidate][change.figure] = change
    assert "generated_tokens_per_second" not in changes[SEEN]
    assert "weights_stored_bytes" in changes[SEEN]
    assert all("generated_tokens_per_second" in figures for name, figures in changes.items() if name == "hqq:int8")
    assert condition.before == "none known"
    assert f"{SEEN} (40%)" in condition.after
    assert not condition.quality


def test_a_share_stays_with_the_speed_that_it_was_measured_with(marked):
    before = next(row.result for row in marked.rows if row.candidate.name == SEEN)
    quality = Result(job=before.job, status="done", parts=("quality",))
    assert joined(before, quality).other_work_share == 0.4
    again = Result(job=before.job, status="done", parts=("speed",), speed=before.speed, other_work_share=0.0)
    assert joined(before, again).other_work_share == 0.0
