"""Twenty kills of each command that writes, at moments over its whole run: nothing half is left, nothing is lost.

The moments are spread over the time that an undisturbed run takes after its imports. What is at the output after a
kill is nothing or the whole; the next run removes what the killed one left and gives what an undisturbed run gives.
Comparisons are killed in test_compare.py. Minutes: `python -m nox -s fuzz` runs these.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time

import polyquant
import psutil
import pytest
from polyquant.isolated.creating import create
from polyquant.isolated.installer import Index
from polyquant.support.progress import SILENT
from polyquant.testing.models import tiny_model
from safetensors.torch import load_file

from .isolating import gone

pytestmark = pytest.mark.slow
KILLS = 20
TUNING = {"rank": 4, "batch_size": 4, "steps": 6, "checkpoint_every": 1, "learning_rate": 1e-3}
CALLS = {
    "quantize": 'polyquant.quantize(model, "rowwise", out, device="cpu", overwrite=True)',
    "finetune": f'polyquant.finetune(model, data, out, backend="rowwise", device="cpu", **{TUNING})',
    "merge": 'polyquant.merge(model, adapter, out, "dense", force=True, overwrite=True)',
}
RUN = """
import sys, peft, polyquant, torch, transformers
model, data, adapter, out = sys.argv[1:]
print("ready", flush=True)
{CALL}
print("done", flush=True)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, rowwise):
    """(model, data, adapter), as the commands take them."""
    folder = tmp_path_factory.mktemp("inputs")
    model, data = tiny_model("llama", folder), folder / "train.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"What is {n}? ", "completion": f"{n}."}) for n in range(16)))
    polyquant.finetune(model, data, folder / "adapter", backend="rowwise", device="cpu", **TUNING)
    return [str(model), str(data), str(folder / "adapter")]


@pytest.fixture
def start(inputs, rowwise):
    """Start a call in a process of its own; gives it once everything is imported."""

    def run(call, out):
        command = [sys.executable, "-c", RUN.replace("{CALL}", CALLS[call]), *inputs, str(out)]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": rowwise},
        )
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        return process

    return run


def finished(process):
    """Seconds that it takes from now to its end, which is good."""
    began = time.perf_counter()
    said, errors = process.communicate(timeout=300)
    assert said == "done\n", errors[-3000:]
    return time.perf_counter() - began


def killed(process, moment):
    """Whether a process still ran `moment` seconds from now, when it was killed; what it had started ends with it."""
    try:
        process.wait(moment)
        children, hit = [], False
    except subprocess.TimeoutExpired:
        children, hit = psutil.Process(process.pid).children(recursive=True), True
        process.kill()
    process.communicate()
    assert all(gone(child.pid) for child in children)
    return hit


def tensors(out):
    """What is in the weights of a folder, by file and name."""
    files = sorted(out.glob("*.safetensors"))
    return {(path.name, name): tensor for path in files for name, tensor in load_file(path).items()}


def same(one, other):
    return one.keys() == other.keys() and all(bool((tensor == other[name]).all()) for name, tensor in one.items())


@pytest.mark.parametrize("call", CALLS)
def test_twenty_kills_leave_nothing_half_and_lose_nothing(start, tmp_path, call):
    seconds = finished(start(call, tmp_path / "whole"))
    whole, folder = tensors(tmp_path / "whole"), tmp_path / "killed"
    folder.mkdir()
    out, chance, hits, there = folder / "out", random.Random(11), 0, 0  # noqa: S311
    for number in range(KILLS):
        hits += killed(start(call, out), (number + chance.random()) / KILLS * seconds)
        if out.exists():
            assert same(tensors(out), whole), "what is there is whole"
            there += 1
            if call == "finetune":  # which goes on where it was, and does not begin again where it is done
                shutil.rmtree(out)
    print(f"{call}: {hits} of {KILLS} kills hit, {there} times there was an output after it, {seconds:.1f} s each")
    assert hits > KILLS / 2
    finished(start(call, out))
    assert same(tensors(out), whole)
    assert [path.name for path in folder.iterdir()] == ["out"]


def test_twenty_kills_of_the_making_of_an_environment(isolated_rowwise):
    found = polyquant.backend("rowwise").environment

    def run():
        command = [sys.executable, "-m", "polyquant", "env", "create", "rowwise"]
        environment = {**os.environ, "PYTHONPATH": isolated_rowwise}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    began = time.perf_counter()
    _, errors = run().communicate(timeout=300)
    assert found.problem() is None, errors
    seconds, chance, hits = time.perf_counter() - began, random.Random(5), 0  # noqa: S311
    for number in range(KILLS):
        shutil.rmtree(found.folder, ignore_errors=True)
        hits += killed(run(), (number + chance.random()) / KILLS * seconds)
        if found.problem() is None:
            assert polyquant.backend("rowwise").problems("cpu") == [], "it says that it is whole, and it is"
    print(f"env create: {hits} of {KILLS} kills hit, {seconds:.1f} s each")
    assert hits > KILLS / 2
    create(found, Index(), SILENT)
    assert found.problem() is None
    assert [path.name for path in found.folder.parent.iterdir() if path.is_dir()] == [found.folder.name]
