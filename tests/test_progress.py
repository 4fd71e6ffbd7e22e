"""Steps of work from where it is done to where they are seen: through a child process, by name, in a terminal."""

import io
from types import SimpleNamespace

import pytest
from polyquant.support import processes
from polyquant.support.progress import ProgressOf, Step
from rich.console import Console
from rich.live import Live

CHILD = """
from polyquant.support.processes import ParentProgress
from polyquant.support.progress import Step
print("[step] 3 of a library's own", flush=True)
for window in (1, 2):
    ParentProgress().step(Step(what="quality", done=window, of=2))
ParentProgress().step(Step(what="speed"))
print("the last word")
"""


@pytest.fixture
def seen():
    return []


@pytest.fixture
def progress(seen):
    return SimpleNamespace(step=seen.append)


def test_the_steps_of_a_child_are_seen_here_and_are_no_last_words(tmp_path, monkeypatch, progress, seen):
    (tmp_path / "reporting_child.py").write_text(CHILD)
    monkeypatch.syspath_prepend(tmp_path)
    ended = processes.run_logged("reporting_child", [], tmp_path / "log", limit_seconds=60, progress=progress)
    assert (ended.code, ended.said) == (0, "the last word")
    assert seen == [Step(what="quality", done=1, of=2), Step(what="quality", done=2, of=2), Step(what="speed")]
    assert [str(step) for step in seen] == ["quality 1/2", "quality 2/2", "speed"]


def test_pieces_of_work_are_told_apart_by_name(progress, seen):
    ProgressOf(progress, "one").step(Step(what="loading"))
    ProgressOf(progress, "other").step(Step(what="loading"))
    assert [step.work for step in seen] == ["one", "other"]


def test_a_table_follows_the_rows_of_a_comparison():
    from polyquant.cli.progress import RowTable
    from polyquant.comparison.candidates import Candidate
    from polyquant.comparison.records import Job, Result, Row

    rows = [
        Row(candidate=Candidate(name=name, backend="dense"), key=name, command="")
        for name in ("dense:float32", "dense:bfloat16")
    ]
    console = Console(file=io.StringIO(), width=80)
    with Live(console=console, auto_refresh=False) as display:

        def drawn():
            with console.capture() as captured:
                console.print(display.renderable)
            return [" ".join(line.split()) for line in captured.get().splitlines()]

        table = RowTable(display)
        table.begin(rows)
        assert drawn()[1:3] == ["dense:float32 waiting", "dense:bfloat16 waiting"]
        table.step(Step(what="reference", done=1, of=4))
        assert drawn()[-1] == "reference 1/4"
        table.step(Step(what="quality", done=3, of=4, work="dense:bfloat16"))
        assert drawn()[1:] == ["dense:float32 waiting", "dense:bfloat16 quality 3/4", "0 of 2 done"]
        failed = Result(job=Job(model="m", backend="dense"), status="failed", reason="gone")
        table.finish(Row(candidate=rows[1].candidate, key=rows[1].key, command="", result=failed))
        assert drawn()[2] == "dense:bfloat16 failed"
        assert drawn()[-1].startswith("1 of 2 done, about")


def test_steps_without_a_terminal_are_lines(capsys):
    from polyquant.cli.progress import showing_steps

    with showing_steps("a backend") as shown:
        shown.step(Step(what="installing", done=1, of=3))
    assert capsys.readouterr().err == "'a backend': installing 1/3\n"
