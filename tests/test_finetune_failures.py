"""Fine-tuning where the machine fails: a full disk, no memory, a kill at the worst moment. Tiny models, real failures."""

import json
import os
import subprocess
from types import SimpleNamespace

import polyquant
import pytest
from polyquant.errors import SaveError, TrainingConflict
from polyquant.finetuning import state
from polyquant.testing import warm
from polyquant.testing.models import tiny_model

LINES = [{"prompt": f"What is {number}? ", "completion": f"It is {number}, sir."} for number in range(16)]
OPTIONS = {"rank": 64, "batch_size": 4, "steps": 6, "checkpoint_every": 2, "learning_rate": 1e-3}
RUN = """
import os, resource, sys
from types import SimpleNamespace
import polyquant
from polyquant.errors import PolyquantError
model, data, out, options = sys.argv[1], sys.argv[2], sys.argv[3], {OPTIONS}
def report(step): ...
{BEFORE}
try:
    polyquant.finetune(model, data, out, backend="rowwise", device="cpu", progress=SimpleNamespace(step=report), **options)
except PolyquantError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model("llama", tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def data(tmp_path):
    return written(tmp_path)


def written(folder):
    path = folder / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)))
    return path


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory, rowwise):
    """The last loss of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    return tune(model, written(folder), folder / "out").last_loss


def tune(model, data, out, **more):
    return polyquant.finetune(model, data, out, backend="rowwise", device="cpu", **OPTIONS, **more)


def failed(model, data, out, rowwise, before, ends=0):
    """What a run in a process of its own says, in which the code `before` has made something fail."""
    code = RUN.replace("{OPTIONS}", repr(OPTIONS)).replace("{BEFORE}", before)
    command = [warm.interpreter(), "-c", code, model, str(data), str(out)]
    environment = {**os.environ, "PYTHONPATH": rowwise}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert ended.returncode == ends, ended.stderr[-3000:]
    return ended.stdout.strip()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 5 MiB, and how to give it room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=100m", str(folder)], check=True)
    subprocess.run(["umount", str(folder)], check=True)


def test_on_a_full_disk_the_run_says_so_and_goes_on_when_there_is_room(model, data, small_disk, whole, rowwise):
    disk, make_room = small_disk  # a checkpoint is 6 MB: adapters, and two moments for each of their weights
    with pytest.raises(
        SaveError, match=r"could not be written to .*disk.* 0 MiB are free.*give the same command again"
    ):
        tune(model, data, disk / "adapter")
    assert not (disk / "adapter").exists()
    make_room()
    result = tune(model, data, disk / "adapter")
    assert any("was half written" in note for note in result.notes)
    assert result.last_loss == whole
    assert [path.name for path in disk.iterdir()] == ["adapter"]


def test_a_disk_that_fills_up_later_costs_what_came_after_the_last_checkpoint(model, data, tmp_path, whole, rowwise):
    """No file may grow over 20 kB once step 3 is done, as under a quota: checkpoint-2 is whole, 4 is not."""
    limit = """
def report(step):
    if step.done == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
"""
    said = failed(model, data, tmp_path / "out", rowwise, limit)
    assert said.startswith("SaveError"), said
    assert "the one before it is kept" in said
    result = tune(model, data, tmp_path / "out")
    assert result.resumed_from == 2
    assert any("checkpoint-4 was half written" in note for note in result.notes)
    assert result.last_loss == whole


WRITING = """
from polyquant.finetuning import run as running
write, write_curve = running.write, running.write_curve
def limited(*arguments, **more):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    return write(*arguments, **more)
def killed(*arguments):
    os._exit(9)
"""


@pytest.mark.parametrize(
    ("before", "ends"), [("running.write = limited", 0), ("running.write_curve = killed", 9)], ids=["full disk", "kill"]
)
def test_what_fails_while_the_adapter_is_written_costs_nothing(model, data, tmp_path, whole, rowwise, before, ends):
    """Everything is in the last checkpoint."""
    said = failed(model, data, tmp_path / "out", rowwise, WRITING + before, ends)
    assert ends or said.startswith(f"SaveError writing {tmp_path / 'out'} failed"), said
    assert not (tmp_path / "out").exists()
    trained = []
    result = tune(model, data, tmp_path / "out", progress=SimpleNamespace(step=trained.append))
    assert not trained
    assert (result.resumed_from, result.last_loss) == (OPTIONS["steps"], whole)


def test_out_of_memory_says_what_to_lower(model, tmp_path, rowwise):
    """After the first step the process has 32 MiB left, of what it holds and has freed as well; a step takes more."""
    limit = """
held = []
def report(step):
    if held:
        return
    taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**26, resource.RLIM_INFINITY))
    try:
        while True:
            held.append(bytearray(2**20))
    except MemoryError:
        del held[-32:]
options |= {"batch_size": 16}
"""
    (tmp_path / "train.txt").write_text("\n\n".join(["I know what it is. " * 40] * 64))
    said = failed(model, tmp_path / "train.txt", tmp_path / "out", rowwise, limit)
    assert said.startswith("OutOfMemory training ran out of memory"), said
    assert "lower batch_size (now 16; raise accumulation" in said
    assert "max_length (--max-length), rank (now 64)" in said


def test_a_job_cut_short_is_thrown_away_with_its_run(model, data, tmp_path, whole, rowwise):
    """As a full disk leaves it where it is not written in one step."""

    def stop(step):
        if step.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, data, tmp_path / "out", progress=SimpleNamespace(step=stop))
    job = state.working_folder(tmp_path / "out") / state.JOB
    os.truncate(job, job.stat().st_size // 2)
    result = tune(model, data, tmp_path / "out")
    assert result.resumed_from == 0
    assert any("job.json of an unfinished run was cut short" in note for note in result.notes)
    assert result.last_loss == whole


def test_a_second_run_to_the_same_folder_is_refused(model, data, tmp_path, whole, rowwise):
    def meanwhile(step):
        if step.done == 2:
            refused.append(failed(model, data, tmp_path / "out", rowwise, ""))

    refused = []
    result = tune(model, data, tmp_path / "out", progress=SimpleNamespace(step=meanwhile))
    (said,) = refused
    assert said.startswith("SaveError another process is writing"), said
    assert result.last_loss == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "train.jsonl"]


def test_neither_data_nor_base_is_overwritten_with_the_adapter(model, tmp_path, rowwise):
    tune(model, written(tmp_path), tmp_path / "out")
    os.rename(tmp_path / "train.jsonl", tmp_path / "out" / "README.md")
    with pytest.raises(SaveError, match="README.md is read from there"):
        tune(model, tmp_path / "out" / "README.md", tmp_path / "out", overwrite=True)
    with pytest.raises(SaveError, match=f"out is not replaced: {tmp_path / 'out'} is read from there"):
        polyquant.merge(model, tmp_path / "out", tmp_path / "out", "dense", overwrite=True)
    base = polyquant.quantize(model, "rowwise", tmp_path / "base", device="cpu")
    data = written(tmp_path)
    with pytest.raises(SaveError, match="base is not replaced: .*base is read from there"):
        polyquant.finetune(base, data, base, backend="rowwise", device="cpu", overwrite=True, **OPTIONS)
    with pytest.raises(SaveError, match="base is not replaced: .*base is read from there"):
        polyquant.load(base, device="cpu").save(base, overwrite=True)
    with pytest.raises(SaveError, match="base is not replaced: .*base is read from there"):
        polyquant.quantize(base, "rowwise", base, device="cpu", overwrite=True)
    assert polyquant.quantize(model, "rowwise", base, device="cpu", overwrite=True) == base


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_checkpoint_cut_short_is_thrown_away(model, data, tmp_path, whole, rowwise, name):
    def stop(step):
        if step.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, data, tmp_path / "out", progress=SimpleNamespace(step=stop))
    damaged = state.working_folder(tmp_path / "out") / "checkpoint-4" / name
    os.truncate(damaged, damaged.stat().st_size // 2)
    result = tune(model, data, tmp_path / "out")
    assert result.resumed_from == 2
    assert any("checkpoint-4 was half written" in note for note in result.notes)
    assert result.last_loss == whole


def test_an_end_that_is_no_longer_held_is_none(model, data, tmp_path, whole, rowwise):
    """A run that had ended before its adapter was written, whose last checkpoint was damaged then, goes on to its end."""

    def stop(step):
        if step.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, data, tmp_path / "out", progress=SimpleNamespace(step=stop))
    state.mark_ended(state.working_folder(tmp_path / "out"), 6)
    result = tune(model, data, tmp_path / "out")
    assert result.resumed_from == 4
    assert result.last_loss == whole


def test_what_a_run_without_a_checkpoint_left_is_no_part_of_the_next(tmp_path):
    out = tmp_path / "out"
    folder = state.begin(out, {"rank": 2}, restart=False)
    state.mark_ended(folder, 2)
    (folder / "runs").mkdir()
    assert state.begin(out, {"rank": 4}, restart=False) == folder
    assert [path.name for path in folder.iterdir()] == [state.JOB]
    (folder / "checkpoint-2").mkdir()
    with pytest.raises(TrainingConflict, match="rank: unfinished run 4, now 8"):
        state.begin(out, {"rank": 8}, restart=False)
    assert not state.has_ended(folder, folder / "checkpoint-2", 4)
    state.mark_ended(folder, 2)
    assert state.has_ended(folder, folder / "checkpoint-2", 4)
