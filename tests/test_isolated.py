"""Backends in environments of their own: a real environment, a real worker, the third-party backend of the tests."""

import gc
import json
import os
import re
import signal
import subprocess

import polyquant
import psutil
import pytest
import torch
from polyquant.loading.load import load_model
from polyquant.loading.options import LoadOptions
from polyquant.registry.backend import Backend
from polyquant.errors import BackendFailed, ConfigError
from polyquant.comparison import environments
from polyquant.isolated.environments import read_record
from polyquant.isolated.remote import RemoteModel
from polyquant.isolated.worker import InWorker
from polyquant.registry.observers import Recorder
from polyquant.models.model import Model
from polyquant.packed_weights import kernels
from polyquant.testing import warm
from polyquant.testing.models import tiny_model

from .installing import write_metadata
from .isolating import gone
from .serving import answers_like

TOKENS = list(range(3, 40))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(environment, folder):
    return polyquant.load(folder, "rowwise", device="cpu")


@pytest.fixture(scope="module")
def here(environment, folder, tmp_path_factory):
    """The same model, loaded by the plugin in this process: the environment sees the same libraries."""
    handle, site = Backend("rowwise", polyquant.registry.installed.registry()), tmp_path_factory.mktemp("site")
    write_metadata(site, "polyquant-outer", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        return load_model(Model.find(folder), handle, handle.config({}), {}, LoadOptions(device="cpu"))


def test_the_doctor_and_the_command_line_know_it(environment, run_python, isolated_rowwise, folder):
    variables = {**os.environ, "PYTHONPATH": isolated_rowwise}
    said = run_python("doctor", "rowwise", "--device", "cpu", env=variables)
    assert f"runs in environment {environment.name}" in " ".join(said.stdout.split()), said.stdout + said.stderr
    listed = json.loads(run_python("env", "list", "--json", env=variables).stdout)
    assert [each["state"] for each in listed if each["folder"] == str(environment.folder)] == ["created"]
    assert run_python("env", "path", "rowwise", env=variables).stdout.strip() == str(environment.folder)
    wrong = run_python("env", "create", "gguf", env=variables)
    assert (wrong.returncode, "gguf needs no environment of its own" in wrong.stderr) == (2, True)
    ran = run_python("run", str(folder), "Hello", "-b", "rowwise", "--max-new-tokens", "8", env=variables)
    assert ran.returncode == 0, ran.stderr
    assert "polyquant-outer==1.0" in read_record(environment.folder).installed


def test_logits_and_greedy_tokens_are_those_of_the_same_backend_in_process(loaded, here):
    assert isinstance(loaded, RemoteModel)
    assert torch.equal(loaded.logits(TOKENS), here.logits(TOKENS))
    text = "The captain stood on the deck"
    pieces = list(loaded.stream(text, max_new_tokens=24, do_sample=False))
    assert len(pieces) > 1
    assert "".join(pieces) == here.generate(text, max_new_tokens=24, do_sample=False)
    assert loaded.kv_cache_bytes_per_token(TOKENS) == here.kv_cache_bytes_per_token(TOKENS)
    assert (loaded.kernel, loaded.config) == (here.kernel, here.config)


def test_layers_and_verification_are_those_of_the_module(loaded, here):
    assert loaded.layers == loaded.initial_layers == here.layers
    report, ours = polyquant.verify(loaded, max_new_tokens=4), polyquant.verify(here, max_new_tokens=4)
    assert report.passed
    assert [check.name for check in report.checks] == [check.name for check in ours.checks]
    assert report.memory.weights_stored_bytes == ours.memory.weights_stored_bytes
    assert report.memory.weights_reported_bytes is not None
    assert any("runs in the environment rowwise-" in note for note in report.notes)


def test_it_is_no_torch_module_here(loaded, tmp_path):
    capabilities = loaded.backend.capabilities
    assert (capabilities.runtime, capabilities.trains) == ("a worker", False)
    assert "rowwise" not in polyquant.backends(runtime="torch").names
    assert not loaded.backend.can("prepare_for_training")
    with pytest.raises(polyquant.errors.UnsupportedOperation, match="rowwise cannot train"):
        polyquant.finetune(loaded, tmp_path, tmp_path / "adapter")


def test_sessions_keep_their_context(loaded):
    feed, other = loaded.session(), loaded.session()
    feed(TOKENS)
    other(TOKENS[:3])
    feed(TOKENS[:1])
    del feed
    gc.collect()
    assert loaded.model._forgotten == [1]
    other(TOKENS[:1])
    assert loaded.model._forgotten == []


def test_a_quantized_key_value_cache_is_kept_there(environment, folder, loaded):
    coded = polyquant.load(folder, "rowwise", device="cpu", kv_cache="int4")
    full, each = loaded.kv_cache_bytes_per_token(TOKENS), coded.kv_cache_bytes_per_token(TOKENS)
    assert each == 2 * 2 * 2 * (64 // 2 + 2 * full // (2 * 2 * 2 * 64))  # codes, a scale and a minimum in its dtype
    report = polyquant.verify(coded, max_new_tokens=4)
    assert (report.passed, report.memory.kv_cache_bytes_per_token) == (True, each)
    assert coded.generate("The captain", max_new_tokens=8, do_sample=False)
    feed = coded.session()
    feed(TOKENS)
    feed(TOKENS[:1])
    with pytest.raises(polyquant.errors.UnsupportedOperation, match="runs elsewhere"):
        coded.new_cache()


def test_a_saved_model_loads_back_there(loaded, tmp_path):
    again = polyquant.load(loaded.save(tmp_path / "saved"), device="cpu")
    assert isinstance(again, RemoteModel)
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))


def test_packed_kernels_are_those_of_this_environment(environment, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("POLYQUANT_KERNEL", "auto")
    usual, packed = (polyquant.load(folder, "rowwise", device="cpu", kernel=kernel) for kernel in ("library", "auto"))
    assert packed.config.kernel == "packed" and packed.kernel.startswith(kernels.name())
    assert polyquant.verify(packed).passed
    assert (packed.logits(TOKENS) - usual.logits(TOKENS)).abs().max() < 0.05
    again = polyquant.load(packed.save(tmp_path / "saved"), device="cpu")
    assert torch.equal(again.logits(TOKENS), packed.logits(TOKENS))


def test_a_worker_finds_them_where_its_parent_has_them():
    code = (
        "import sys\n"
        "class Nowhere:\n"
        "    def find_spec(self, name, *more):\n"
        "        if name == 'polyquant_kernels': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Nowhere())\n"
        "from polyquant.packed_weights import kernels; print(kernels.library())"
    )
    for variables, found in (({}, False), (kernels.lent(), True)):
        done = subprocess.run(
            [warm.interpreter(), "-c", code],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ("polyquant_kernels" in done.stdout) is found


def test_observers_see_the_calls_that_a_worker_answers(environment, folder, tmp_path):
    seen, asked = Recorder(), []

    class Watch:
        @polyquant.hookimpl(wrapper=True)
        def save(self, loaded, out):
            asked.append((loaded.kernel, out))
            return (yield)

    with polyquant.observing(seen), polyquant.observing(Watch()):
        model = polyquant.load(folder, "rowwise", device="cpu")
        model.save(tmp_path / "saved")
        with pytest.raises(BackendFailed):  # no call of the protocol: the worker's own words
            model.backend._observed("describe_layers", model.model, lambda: model.model.call("nonsense"), model=model)
    of_hook = {record.hook: record for record in seen.records}
    assert {"validate_environment", "build_config", "load", "describe_layers", "save"} <= set(of_hook)
    assert {record.backend for record in seen.records} == {"rowwise"}
    load, here = of_hook["load"], psutil.Process().memory_info().rss
    assert load.seconds > 0 and load.device == "cpu"
    assert load.peak_bytes == next(record.peak_bytes for record in model.records if record.hook == "load") != here
    assert [kernel for kernel, _ in asked] == [model.kernel]
    assert [record.failed for record in seen.records if record.hook == "describe_layers"][-1]


def test_a_trace_shows_them_once(environment, run_python, isolated_rowwise, folder):
    variables = {**os.environ, "PYTHONPATH": isolated_rowwise, "POLYQUANT_TRACE": "1"}
    ran = run_python("run", str(folder), "Hello", "-b", "rowwise", "--max-new-tokens", "2", env=variables)
    assert ran.returncode == 0, ran.stderr
    shown = [line for line in ran.stderr.splitlines() if line.startswith("polyquant: rowwise load: ")]
    assert len(shown) == 1
    assert re.fullmatch(r"polyquant: rowwise load: \d+\.\d{3} s on cpu", shown[0])


def test_quantizing_needs_no_further_word(environment, folder, tmp_path):
    out = polyquant.quantize(folder, "rowwise", tmp_path / "out", device="cpu", scale_dtype="bfloat16")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["scale_dtype"] == "bfloat16"


def test_cells_run_in_the_environment(environment, folder, tmp_path):
    made = polyquant.compare(folder, ["rowwise:int8"], out=tmp_path / "out", parts=("speed",), device="cpu")
    (row,) = made.rows
    assert row.result.status == "done", row.result.reason
    assert row.result.machine.versions["polyquant-outer"] == "1.0"
    assert row.result.job.model == str(folder)
    assert environments.of_backend("dense") is None


def test_errors_of_the_worker_are_errors_here(loaded, folder):
    with pytest.raises(ConfigError, match="generate does not know a parameter") as caught:
        loaded.generate("Hello", max_new_tokens=2, no_such_parameter=1)
    assert isinstance(caught.value.__cause__, InWorker)
    assert "Traceback" in str(caught.value.__cause__)
    with pytest.raises(ConfigError, match="cannot be sent to it"):
        loaded.generate("Hello", stopping_criteria=[object()])
    with pytest.raises(ConfigError, match="token 1000000 is not one of the 384"):
        loaded.logits([10**6])
    with pytest.raises(BackendFailed, match="rowwise: TypeError"):
        loaded.logits([None])
    assert loaded.generate("Hello", max_new_tokens=2)


def test_a_call_in_the_middle_of_a_stream_waits_for_its_rest(loaded):
    whole = loaded.generate("Hello", max_new_tokens=12, do_sample=False)
    pieces = loaded.stream("Hello", max_new_tokens=12, do_sample=False)
    first = next(pieces)
    loaded.logits(TOKENS)
    assert first + "".join(pieces) == whole
    left = loaded.stream("Hello", max_new_tokens=400, do_sample=False)
    next(left)
    left.close()
    assert loaded.generate("Hello", max_new_tokens=12, do_sample=False) == whole


def test_it_is_served_like_any_other(loaded):
    answers_like(loaded)


def test_a_worker_killed_in_the_middle_of_a_stream_is_an_error(environment, folder):
    model = polyquant.load(folder, "rowwise", device="cpu")
    pieces = model.stream("Hello", max_new_tokens=400, do_sample=False)
    next(pieces)
    os.kill(model.model.pid, signal.SIGKILL)
    with pytest.raises(
        BackendFailed, match=r"worker of rowwise is gone: it was killed by signal 9.*load the model again"
    ):
        list(pieces)
    with pytest.raises(BackendFailed, match="is gone"):
        model.logits(TOKENS)


def test_a_worker_ends_with_its_model(environment, folder):
    model = polyquant.load(folder, "rowwise", device="cpu")
    pid = model.model.pid
    assert psutil.pid_exists(pid)
    del model
    gc.collect()
    assert gone(pid)


PARENT = """
import os, sys, polyquant
model = polyquant.load(sys.argv[1], "rowwise", device="cpu")
pieces = model.stream("Hello", max_new_tokens=450, do_sample=False)
next(pieces)
print(model.model.pid, flush=True)
if sys.argv[2] == "idle":
    pieces.close()
    model.logits([1, 2])
sys.stdin.read()
"""


@pytest.mark.parametrize("moment", ["idle", "generating"])
def test_a_worker_ends_with_its_parent(environment, folder, isolated_rowwise, moment):
    variables = {**os.environ, "PYTHONPATH": isolated_rowwise}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    parent = subprocess.Popen([warm.interpreter(), "-c", PARENT, folder, moment], env=variables, **pipes)
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.kill()
    parent.communicate()
    assert gone(pid)
