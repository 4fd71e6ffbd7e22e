"""A comparison from candidates to rows: in processes, resumed, with failures as rows."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from itertools import repeat
from pathlib import Path

import polyquant
import psutil
import pytest
from filelock import FileLock
from polyquant.comparison.candidates import Candidate
from polyquant.comparison.progress import SilentComparison
from polyquant.comparison.result import FILE
from polyquant.errors import BackendFailed, ComparisonBusy, ConfigError, ModelError
from polyquant.testing.models import tiny_model
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("rowwise", "warm_children", "own_cache")
PYTHON = sys.executable
QUICK = {"device": "cpu", "windows": 2, "speed_limit_seconds": 0.05}


class Seen(SilentComparison):
    """Remembers what it saw."""

    def __init__(self):
        self.steps, self.measured = [], []

    def step(self, step):
        self.steps.append(str(step))

    def finish(self, row):
        self.measured.append(row.candidate.name)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model("llama", tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """A comparison of three candidates, one of which cannot be loaded, and its folder."""
    out, seen = tmp_path_factory.mktemp("comparison"), Seen()
    candidates = ["dense:float32", "rowwise:int8", f"rowwise@{out / 'absent'}"]
    comparison = polyquant.compare(model, candidates, out=out, progress=seen, **QUICK)
    return comparison, out, seen


def test_every_candidate_is_a_row(finished, model):
    comparison, out, seen = finished
    dense, rowwise, absent = (row.result for row in comparison.rows)
    assert [row.result.status for row in comparison.rows] == ["done", "done", "failed"]
    assert abs(dense.quality.kl_mean) <= 1e-6
    assert (dense.quality.top1, round(dense.quality.perplexity_ratio, 3)) == (1.0, 1.0)
    assert 0 < rowwise.quality.kl_mean < 0.1
    assert rowwise.memory.weights_stored_bytes == rowwise.stored_bytes < dense.stored_bytes
    assert rowwise.speed.generated_tokens_per_second.mean > 0
    assert "ModelError" in absent.reason
    assert {"loading", "verifying", "quality 1/2", "speed"} <= set(seen.steps)
    assert comparison.setting.model == model
    assert polyquant.read_comparison(out) == comparison
    assert not list((out / "work").iterdir()), "nothing of finished processes is left"


def test_layers_tell_how_far_their_weights_are(finished):
    layers = {layer.name: layer for layer in finished[0].rows[1].result.layers}
    packed = [layer for layer in layers.values() if layer.quantized]
    assert packed
    assert all(0 < layer.relative_error < 0.02 for layer in packed), "8 bits a weight"
    assert layers["model.embed_tokens.weight"].relative_error is None


def test_finished_cells_are_not_measured_again(finished, model):
    comparison, out, _ = finished
    seen = Seen()
    again = polyquant.compare(model, [row.candidate for row in comparison.rows], out=out, progress=seen, **QUICK)
    assert (seen.measured, seen.steps) == ([], [])
    assert again.rows[:2] == comparison.rows[:2]
    more = polyquant.compare(model, ["rowwise:int8", "dense:bfloat16"], out=out, progress=seen, **QUICK)
    assert seen.measured == ["dense:bfloat16"]
    assert more.rows[0] == comparison.rows[1]


def test_two_names_of_one_thing_are_one_row_and_it_is_said(finished, model):
    comparison, out, _ = finished
    twin = Candidate("other name", "rowwise", comparison.rows[1].candidate.options)
    again = polyquant.compare(model, ["rowwise:int8", twin], out=out, **QUICK)
    assert [row.candidate.name for row in again.rows] == ["rowwise:int8"]
    assert "other name asks for the same as rowwise:int8: one row" in again.notes


def test_a_cell_file_that_was_changed_is_measured_again(finished, model):
    comparison, out, _ = finished
    row = comparison.rows[1]
    path = out / "cells" / f"{row.key}.json"
    for content, said in (
        (path.read_text().replace('"kl_mean":', '"kl_mean":0'), "damaged"),
        (path.read_text().replace('"threads":', '"threads": '), "was changed since it was written"),
        (path.read_text()[:100], "damaged"),
    ):
        path.write_text(content)
        seen = Seen()
        again = polyquant.compare(model, ["rowwise:int8"], out=out, progress=seen, **{**QUICK, "parts": ("quality",)})
        assert seen.measured == ["rowwise:int8"]
        assert any(said in note for note in again.notes)
    assert again.rows[0].result.quality.kl_mean == pytest.approx(row.result.quality.kl_mean, rel=1e-3)


def test_parts_are_added_to_what_is_measured(model, tmp_path):
    seen = Seen()
    first = polyquant.compare(model, ["rowwise:int8"], out=tmp_path, **{**QUICK, "parts": ("quality",)})
    assert first.rows[0].result.speed is None
    both = polyquant.compare(model, ["rowwise:int8"], out=tmp_path, progress=seen, **QUICK)
    assert both.rows[0].result.speed
    assert both.rows[0].result.quality == first.rows[0].result.quality
    assert not [step for step in seen.steps if step.startswith("quality")]


def test_cells_of_quality_run_side_by_side_and_give_the_same(finished, model, tmp_path):
    asked = [row.candidate for row in finished[0].rows[:2]]
    parallel = polyquant.compare(model, asked, out=tmp_path, jobs=2, **QUICK)
    for one, other in zip(parallel.rows, finished[0].rows, strict=False):
        assert one.result.quality.kl_mean == pytest.approx(other.result.quality.kl_mean, rel=1e-3, abs=1e-9)
        assert one.result.parts == ("quality", "speed")


def test_what_is_wrong_is_said_before_anything_runs(model, tmp_path):
    for candidates, options, error, said in (
        ([], {}, ConfigError, "no candidate is named"),
        (["rowwise", "rowwise"], {}, ConfigError, "named twice: rowwise"),
        (["rowwise:int9"], {}, ConfigError, "has no preset 'int9'"),
        (["rowwise"], {"preset": "llama-512"}, ConfigError, "no preset 'llama-512'"),
        (["rowwise"], {"windows": -1}, ConfigError, "windows must be"),
        (["rowwise"], {"parts": ("tasks",)}, ConfigError, "no task is named"),
        (["rowwise"], {"text": "absent.txt"}, ConfigError, "no such file: absent.txt"),
        (["rowwise"], {"nonsense": 1}, TypeError, "unexpected keyword argument 'nonsense'"),
    ):
        with pytest.raises(error, match=said):
            polyquant.compare(model, candidates, out=tmp_path / "out", **{**QUICK, **options})
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match="no such file or folder"):
        polyquant.compare("./absent", ["rowwise"], out=tmp_path / "out")


def test_a_text_shorter_than_a_window_is_refused(model, tmp_path):
    (tmp_path / "short.txt").write_text("Only a few words.")
    with pytest.raises(BackendFailed, match="one window of llamacpp-512 takes 512"):
        polyquant.compare(model, ["rowwise"], out=tmp_path, **{**QUICK, "text": str(tmp_path / "short.txt")})


def test_the_reference_may_be_another_candidate_or_a_folder(finished, model, tmp_path):
    """The report says so; against itself a backend is at zero."""
    quick = {**QUICK, "parts": ("quality",)}
    made = polyquant.compare(model, ["rowwise:int8"], out=tmp_path, reference="rowwise:int8", **quick)
    assert abs(made.rows[0].result.quality.kl_mean) <= 1e-6
    assert "the reference is rowwise:int8, not the dense model in float32" in made.notes
    folder = finished[0].rows[1].result.job.reference
    again = polyquant.compare(model, ["rowwise:int8"], out=tmp_path, reference=folder, **quick)
    expected = finished[0].rows[1].result.quality.kl_mean
    assert again.rows[0].result.quality.kl_mean == pytest.approx(expected, rel=1e-3)
    assert f"the reference is what {folder} holds; its text and model are not known here" in again.notes
    with pytest.raises(ConfigError, match="give --preset llamacpp-512"):
        polyquant.compare(model, ["rowwise"], out=tmp_path, reference=folder, preset="gptq-2048", **quick)


def test_logits_that_are_no_numbers_are_a_failure(finished, model, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in Path(model).iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"].fill_(math.nan)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    row = polyquant.compare(model, [f"rowwise@{broken}"], out=finished[1], **QUICK).rows[0]
    assert row.result.status == "failed"
    assert "the candidate's logits are NaN or infinite" in row.result.reason


def test_a_full_disk_is_said_and_finished_cells_are_kept(finished, model, tmp_path, run_python):
    """A real limit on the size of files, in a process of its own; the same call then goes on."""
    shutil.copytree(finished[1], tmp_path / "out")
    code = f"""
import resource, signal, sys, polyquant
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
polyquant.compare({model!r}, ["dense:float32"], out={str(tmp_path / "out")!r}, device="cpu", windows=2,
    speed_limit_seconds=0.05, parts=("speed",), retry=True)
"""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    result = run_python(
        code=code, env={**os.environ, "PYTHONPATH": path}, fresh=True
    )  # else what it says goes to a file, which is limited too
    assert "SaveError: cannot write" in result.stderr, result
    assert "MiB are free there" in result.stderr
    seen = Seen()
    polyquant.compare(model, ["dense:float32"], out=tmp_path / "out", progress=seen, **QUICK)
    assert seen.measured == []


def test_one_run_at_a_time_in_a_folder(model, tmp_path):
    with FileLock(str(tmp_path / ".lock")), pytest.raises(ComparisonBusy, match="another comparison is running"):
        polyquant.compare(model, ["rowwise"], out=tmp_path, **QUICK)


def test_another_models_tokens_are_refused(finished, model, tmp_path):
    """The same weights under a tokenizer that numbers two tokens the other way round."""
    other = tmp_path / "other"
    other.mkdir()
    for path in Path(model).iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [token for token in vocabulary if token.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    row = polyquant.compare(model, [f"rowwise@{other}"], out=finished[1], **QUICK).rows[0]
    assert "the tokenizers differ in" in row.result.reason


def test_a_cell_that_takes_too_long_is_stopped(model, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", PYTHON)  # which imports torch: that takes two seconds
        row = polyquant.compare(
            model, ["rowwise:int8"], out=tmp_path, **{**QUICK, "timeout_seconds": 2, "parts": ("speed",)}
        ).rows[0]
    assert row.result.reason.startswith("it took longer than 2 s and was stopped")
    again = Seen()
    polyquant.compare(model, ["rowwise:int8"], out=tmp_path, progress=again, **{**QUICK, "parts": ("speed",)})
    assert again.measured == [], "a failure is a row until it is asked for again"
    polyquant.compare(
        model, ["rowwise:int8"], out=tmp_path, progress=again, **{**QUICK, "parts": ("speed",), "retry": True}
    )
    assert again.measured == ["rowwise:int8"]


RUN = """
import sys, polyquant
from polyquant.comparison.progress import SilentComparison
class Printing(SilentComparison):
    def finish(self, row): print(row.result.status, row.candidate.name, flush=True)
    def step(self, step): print("step", step, flush=True)
polyquant.compare(sys.argv[1], sys.argv[3:], out=sys.argv[2], progress=Printing(), device="cpu", windows=2,
    speed_limit_seconds=0.05, retry=True)
"""


def start(model, out, candidates):
    path = os.pathsep.join(entry for entry in sys.path if entry)
    command = [PYTHON, "-c", RUN, model, str(out), *candidates]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})


def cells_of(run):
    """The processes of cells that a run has started."""
    started = psutil.Process(run.pid).children(recursive=True)
    return [process for process in started if "polyquant.comparison.cell.run" in process.cmdline()]


def killed_until_done(model, out, candidates, moments, victims, most=1):
    """Kill `victims(run)` after each of the moments, in seconds, `most` times, and run again until every row is there.

    Gives the names that were measured, in all runs together, and how many kills hit.
    """
    measured, hits = [], 0
    while True:
        run = start(model, out, candidates)
        try:
            run.wait(next(moments) if hits < most else None)
        except subprocess.TimeoutExpired:
            for victim in victims(run):
                victim.kill()
                hits += 1
        said, _ = run.communicate(timeout=120)
        measured += [line.removeprefix("done ") for line in said.splitlines() if line.startswith("done ")]
        if run.returncode == 0 and all(row.result.status == "done" for row in polyquant.read_comparison(out).rows):
            return measured, hits


def require_the_same(out, measured, finished):
    """Nothing was measured twice, each row has its file, and the figures are those of a run that was not killed."""
    assert len(measured) == len(set(measured))
    comparison = polyquant.read_comparison(out)
    assert {row.key for row in comparison.rows} == {path.stem for path in (out / "cells").glob("*.json")}
    for one, other in zip(comparison.rows, finished[0].rows[:2], strict=True):
        assert one.result.quality.kl_mean == pytest.approx(other.result.quality.kl_mean, rel=1e-3, abs=1e-9)


CANDIDATES = ["dense:float32", "rowwise:int8"]


def test_a_killed_run_goes_on_and_measures_nothing_twice(finished, model, tmp_path):
    moment = random.Random(7).uniform(1, 8)  # noqa: S311
    measured, _ = killed_until_done(model, tmp_path, CANDIDATES, repeat(moment), lambda run: [run])
    require_the_same(tmp_path, measured, finished)


@pytest.mark.slow
@pytest.mark.parametrize("victims", [lambda run: [run], lambda run: cells_of(run)[:1]], ids=["run", "cell"])
def test_ten_kills_at_random_moments_change_nothing(finished, model, tmp_path, victims):
    """In as many comparisons as it takes for ten to hit."""
    chance, hits, comparisons = random.Random(7), 0, 0  # noqa: S311
    moments = iter(lambda: chance.uniform(1, 8), None)
    while hits < 10:
        out = tmp_path / str(comparisons)
        measured, hit = killed_until_done(model, out, CANDIDATES, moments, victims, most=10 - hits)
        require_the_same(out, measured, finished)
        hits, comparisons = hits + hit, comparisons + 1
    print(f"{hits} kills hit in {comparisons} comparisons")


def test_a_cell_dies_with_its_run(model, tmp_path):
    run = start(model, tmp_path, ["rowwise:int8"])
    for line in run.stdout:
        if line.startswith("step loading"):
            break
    cells = cells_of(run)
    assert cells
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    gone, alive = psutil.wait_procs(cells, timeout=30)
    assert (gone, alive) == (cells, [])


def test_a_killed_cell_is_a_row_with_its_reason(model, tmp_path):
    run = start(model, tmp_path, ["rowwise:int8"])
    for line in run.stdout:
        if line.startswith("step loading"):
            cells_of(run)[0].kill()
            break
    run.communicate(timeout=120)
    row = polyquant.read_comparison(tmp_path).rows[0]
    assert row.result.reason.startswith("it was killed by signal 9 (SIGKILL), most likely for lack of memory")
    assert (tmp_path / FILE).exists()


def test_the_command_compares_and_prints(model, tmp_path, run_python, rowwise):
    environment = {**os.environ, "PYTHONPATH": rowwise, "COLUMNS": "120"}
    (tmp_path / "candidates.toml").write_text(
        f'model = "{model}"\ndevice = "cpu"\nwindows = 1\nparts = ["quality"]\n'
        'candidates = ["rowwise:int8", {backend = "rowwise", bits = 8, compute_dtype = "bfloat16", name = "in bfloat16"}]\n'
    )
    result = run_python(
        "compare", "--file", str(tmp_path / "candidates.toml"), "--out", str(tmp_path / "out"), env=environment
    )
    assert result.returncode == 0, result.stderr
    assert "rowwise:int8" in result.stdout
    assert "in bfloat16" in result.stdout
    assert (tmp_path / "out" / "report.html").stat().st_size > 100_000
    wrong = run_python("compare", model, "-c", "rowwise:int9", env=environment)
    assert (wrong.returncode, "has no preset 'int9'" in wrong.stderr) == (2, True)
