"""The run on a GPU: its runner with steps that misbehave, its rehearsal on the CPU, and what the docs read of it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from polyquant.testing import warm

from .isolating import gone

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "docs" / "examples" / "gpu.py"
STEPS = {
    "well": "write({'status': 'done', 'reason': '', 'facts': {'figure': 1}})",
    "hangs": "write({'status': 'unfinished', 'reason': '', 'facts': {'at': '3/9'}}); time.sleep(600)",
    "dies": "write({'status': 'unfinished', 'reason': '', 'facts': {}}); os.kill(os.getpid(), signal.SIGSEGV)",
    "half": 'path.write_text(\'{"status": "do\')',
    "null": "write(None)",
    "number": "write(3)",
    "list": "write([1])",
    "factless": "write({'status': 'done', 'reason': '', 'facts': None})",
    "silent": "print('nothing to say'); sys.exit(3)",
    "leaves": "child = subprocess.Popen(['sleep', '600']); "
    "write({'status': 'done', 'reason': '', 'facts': {'pid': child.pid}})",
}
HEAD = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
path = Path(sys.argv[1])
def write(content):
    path.write_text(json.dumps(content))
"""
SELECTION = (
    "conformance:fp8", "conformance:autoawq", "dense@tiny", "checkpoint:compressed", "bitsandbytes:nf4@tiny", "qlora",
    "auto@tiny",
)  # fmt: skip


def module(path: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def gpu():
    return module(SCRIPT, "gpu_runner")


@pytest.fixture
def run(gpu, tmp_path, monkeypatch):
    """A run whose steps are the scripts of STEPS."""
    for name, body in STEPS.items():
        (tmp_path / f"{name}.py").write_text(f"{HEAD}\n{body}\n")
    monkeypatch.setattr(gpu, "SCRIPTS", tmp_path)
    head = {"date": "2026-01-01T00:00:00+00:00", "asked": {"device": "cpu", "small": False}}
    return gpu.Run(tmp_path, tmp_path, 1.0, head)


@pytest.mark.parametrize(
    ("script", "status", "reason"),
    [
        ("well", "done", ""),
        ("hangs", "failed", "no end within 2 s, at 3/9"),
        ("dies", "failed", "killed by SIGSEGV"),
        ("half", "failed", "ended and left a result that is not whole"),
        ("null", "failed", "ended and left a result that is not whole"),
        ("number", "failed", "ended and left a result that is not whole"),
        ("list", "failed", "ended and left a result that is not whole"),
        ("factless", "failed", "ended and left a result that is not whole"),
        ("silent", "failed", "ended with 3 without a result"),
    ],
)
def test_however_a_step_ends_it_is_a_row_and_the_next_runs(gpu, run, script, status, reason):
    row = run.take(gpu.Step("first", script, limit_seconds=2.0))
    assert (row["status"], row["reason"]) == (status, reason)
    assert run.take(gpu.Step("second", "well"))["status"] == "done"
    written = json.loads((run.out / "gpu.json").read_text())
    assert [row["step"] for row in written["steps"]] == ["first", "second"]
    assert json.loads((run.out / "state.json").read_text()) == {}
    if script == "silent":
        assert row["said"] == ["nothing to say"]


def test_a_step_that_cannot_be_started_is_a_row(gpu, run):
    (run.work / "first.log").mkdir()
    row = run.take(gpu.Step("first", "well"))
    assert row["status"] == "failed" and row["reason"].startswith("could not be started: [Errno 21] Is a directory")
    assert run.take(gpu.Step("second", "well"))["status"] == "done"


def test_a_relative_import_path_holds_in_the_steps_folder(gpu, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(("site", "", "/elsewhere")))
    assert gpu.environment()["PYTHONPATH"] == os.pathsep.join((str(tmp_path / "site"), "/elsewhere"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--minutes", "nan"], "--minutes must be a number above 0, got nan"),
        (["--minutes", "0"], "--minutes must be a number above 0, got 0.0"),
        (["--minutes", "inf"], "--minutes must be a number above 0, got inf"),
        (["--jobs", "0"], "--jobs must be 1 or more, got 0"),
    ],
)
def test_what_is_no_time_or_no_process_is_refused(gpu, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    with pytest.raises(SystemExit):
        gpu.parse()
    assert said in capsys.readouterr().err


def test_a_full_disk_keeps_the_results_before_and_the_run_goes_on(gpu, run, monkeypatch, capsys):
    run.take(gpu.Step("first", "well"))
    before = (run.out / "gpu.json").read_text()
    write = Path.write_text

    def full(path: Path, text: str, **settings) -> int:
        if path.name.endswith(".partial"):
            write(path, text[:10])
            raise OSError(28, "No space left on device")
        return write(path, text, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert run.take(gpu.Step("second", "well"))["status"] == "done"
    assert (run.out / "gpu.json").read_text() == before
    assert "gpu.json is as it was before: [Errno 28] No space left on device\n" in capsys.readouterr().out
    run.take(gpu.Step("third", "well"))
    assert [row["step"] for row in results(run.out)["steps"]] == ["first", "second", "third"]


def test_a_terminal_that_hung_up_ends_no_run(gpu, run, monkeypatch):
    def hung_up(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.print", hung_up)
    assert run.take(gpu.Step("first", "well"))["status"] == "done"


def test_what_a_step_leaves_running_is_ended(gpu, run):
    row = run.take(gpu.Step("leaves", "leaves"))
    assert gone(row["facts"]["pid"])


@pytest.fixture
def doctoring(tmp_path):
    """The runner, at its first step, which never ends; (process, the step's id). nohup: as that would start it."""
    (tmp_path / "machine.py").write_text(f"""
import sys, time
sys.path.insert(0, {str(SCRIPT.with_suffix(""))!r})
import common
def measure(arguments, note):
    note({{"at": "the first"}})
    time.sleep(600)
common.step(measure)
""")
    code = f"""
import pathlib, signal, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import gpu
gpu.SCRIPTS = pathlib.Path({str(tmp_path)!r})
gpu.main()
"""
    started = []

    def start(*, nohup: bool = False) -> tuple[subprocess.Popen, int]:
        hangup = "SIG_IGN" if nohup else "SIG_DFL"  # set, since the tests themselves may run under nohup
        handling = f"import signal; signal.signal(signal.SIGHUP, signal.{hangup})\n"
        handling += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        arguments = ("--device", "cpu", "--out", tmp_path / "out", "--work", tmp_path / "work")
        runner = subprocess.Popen([sys.executable, "-c", handling + code, *arguments], stderr=subprocess.DEVNULL)
        started.append(runner)
        deadline = time.monotonic() + 60
        while not (tmp_path / "work" / "polyquant-gpu" / "doctor.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        started.append(json.loads((tmp_path / "out" / "state.json").read_text())["doctor"])
        return tuple(started)

    yield start
    for each in started:
        try:
            os.kill(each if isinstance(each, int) else each.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    started[0].wait()


def test_a_step_ends_with_its_runner(doctoring):
    runner, step = doctoring()
    runner.kill()
    runner.wait()
    assert gone(step)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_ends_what_runs_and_what_is_known_is_written(doctoring, tmp_path, name):
    runner, step = doctoring()
    runner.send_signal(signal.Signals[name])
    assert runner.wait(30) == 1 and gone(step)
    (row,) = results(tmp_path / "out")["steps"]
    assert row["reason"] == "killed by SIGKILL, at the first"


def test_a_run_that_was_stopped_says_so(gpu, run):
    run.stop(signal.SIGTERM, None)
    assert run.take(gpu.Step("first", "well"))["reason"] == "stopped before it began"
    assert results(run.out)["stopped"] == "SIGTERM"


def test_a_log_that_is_gone_costs_no_row(gpu, run, tmp_path):
    row = gpu.judged(tmp_path / "no answer.json", "ended with 1", tmp_path / "no such.log")
    assert (row["status"], row["reason"]) == ("failed", "ended with 1 without a result")


def test_a_signal_while_a_step_is_started_ends_it_too(gpu, run, monkeypatch):
    start = subprocess.Popen

    def signalled(*arguments, **settings):
        process = start(*arguments, **settings)
        run.stop(signal.SIGTERM, None)  # which does not know of the process yet
        return process

    monkeypatch.setattr(gpu.subprocess, "Popen", signalled)
    row = run.take(gpu.Step("first", "hangs", limit_seconds=30.0))
    assert row["reason"].startswith("killed by SIGKILL") and row["seconds"] < 15


def test_a_process_that_cannot_be_killed_is_not_waited_for_for_ever(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "END_SECONDS", 0.1)
    monkeypatch.setattr(gpu.os, "killpg", lambda *_: None)
    with subprocess.Popen(["sleep", "20"]) as process:
        gpu.end(process)
        assert process.poll() is None
        process.kill()


def test_a_hangup_that_nohup_ignores_ends_nothing(doctoring, tmp_path):
    runner, step = doctoring(nohup=True)
    runner.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        runner.wait(0.5)
    runner.terminate()
    assert runner.wait(30) == 1 and gone(step)


def test_the_clock_the_doctor_and_what_comes_before_decide(gpu, run):
    run.head["diagnoses"] = [{"backend": "x", "on_gpus": True, "problems": [{"what": "libx.so is not found"}]}]
    assert run.take(gpu.Step("a", "well", backend="x"))["reason"] == "libx.so is not found"
    assert run.take(gpu.Step("b", "well", after=("a",)))["reason"] == "after a: libx.so is not found"
    assert run.take(gpu.Step("c", "well", never="it fetches"))["reason"] == "it fetches"
    run.seconds = 1.0
    assert run.take(gpu.Step("d", "well"))["reason"] == "no time was left"
    assert "| d | not run |" in (run.out / "gpu.md").read_text()


def test_models_are_chosen_by_room(gpu):
    gib = 2**30
    assert gpu.sizes(70 * gib, 60 * gib, small=False) == (["1b", "8b"], "")
    fitting, missing = gpu.sizes(12 * gib, 60 * gib, small=False)
    assert fitting == ["1b"] and missing.startswith("the 8b needs 24.0 GiB of the device") and "12.0 GiB" in missing
    fitting, missing = gpu.sizes(70 * gib, 10 * gib, small=False)
    assert fitting == ["1b"] and "20.0 GiB of the disk" in missing
    assert gpu.sizes(gib, gib, small=False)[0] == ["tiny"]
    fitting, missing = gpu.sizes(gib, 2**20, small=True)
    assert fitting == ["tiny"] and missing.startswith("the tiny needs 0.2 GiB of the device and 0.2 GiB of the disk")
    assert gpu.busy(79 * gib, 80 * gib) == ""
    assert gpu.busy(20 * gib, 80 * gib).startswith("the GPU is busy: 60.0 GiB of 80.0 GiB are taken by others")


def test_the_most_valuable_comes_first_and_each_step_has_its_script(gpu, tmp_path):
    listed = gpu.steps(["fp8", "hqq"], ["1b", "8b"], device="cuda", small=False, work=tmp_path)
    names = [step.name for step in listed]
    assert len(set(names)) == len(names)
    order = ("model:1b", "conformance:fp8", "bitsandbytes:nf4@1b", "qlora@1b", "hqq:int4@1b", "budget@8b",
             "hqq:int4@8b", "hqq:int4@1b direct")  # fmt: skip
    assert sorted(order, key=names.index) == list(order)
    for step in listed:
        assert (SCRIPT.with_suffix("") / f"{step.script}.py").exists()
        assert all(names.index(name) < names.index(step.name) for name in step.after), step.name
    first = next(gpu.groups(listed, small=False))
    assert {step.script for step in first} == {"model", "conformance"}, "nothing that is timed runs beside another"


def test_what_a_chosen_step_comes_after_is_chosen_too(gpu, tmp_path):
    listed = gpu.steps(["fp8", "gptq"], ["1b", "8b"], device="cuda", small=False, work=tmp_path)

    def names(only: str) -> list[str]:
        return [step.name for step in gpu.selected(listed, only)]

    assert names("") == [step.name for step in listed]
    assert names("gptq:int4@1b direct") == ["model:1b", "checkpoint:gptq:int4@1b", "gptq:int4@1b direct"]
    assert names("budget,conformance:fp8") == ["model:8b", "conformance:fp8", "dense@8b", "budget@8b"]
    assert names("no such step") == []


def test_no_gpu_says_what_to_do(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = rehearse(tmp_path, "--device", "cuda")
    assert done.returncode == 1
    assert f"no GPU: torch {torch.__version__}" in done.stderr and "--device cpu --small" in done.stderr
    (row,) = results(tmp_path)["steps"]
    assert row["status"] == "not run"


@pytest.mark.parametrize(("before", "keep"), [(True, False), (False, False), (False, True)])
def test_of_the_folder_for_models_only_its_own_part_is_removed(gpu, tmp_path, monkeypatch, before, keep):
    """Here where the first step finds nothing to run on, and the results go into the same folder."""
    (tmp_path / "machine.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr(gpu, "SCRIPTS", tmp_path)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    work = tmp_path / "scratch"
    if before:
        work.mkdir()
        (work / "thesis.txt").write_text("precious")
    out = work if before else tmp_path / "out"
    arguments = ["--work", work, "--out", out, "--device", "cpu", *(["--keep"] if keep else [])]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
    with pytest.raises(SystemExit, match="nothing more was run: ended with 1 without a result"):
        gpu.main()
    assert work.exists() == (before or keep) and (work / "polyquant-gpu").exists() == keep
    assert (work / "thesis.txt").exists() == before and (out / "gpu.json").exists()


def test_a_model_without_room_on_the_disk_is_not_begun(tmp_path):
    scripts = SCRIPT.with_suffix("")
    code = f"""
import sys, shutil
sys.path.insert(0, {str(scripts)!r})
import common, model
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(2**31, 2**30, 2**30)
try:
    model.measure({{"size": "1b", "model": {str(tmp_path / "m")!r}, "device": "cpu"}}, print)
except common.NotRun as reason:
    print(reason)
"""
    done = subprocess.run([warm.interpreter(), "-c", code], capture_output=True, text=True, check=True)
    assert "its checkpoints need 6.9 GiB, and 1.0 GiB are free" in done.stdout
    assert not (tmp_path / "m").exists()


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """A rehearsal of SELECTION in which one step is killed as soon as it runs; (folder, what was printed)."""
    out = tmp_path_factory.mktemp("rehearsal")
    killed = killing(out, "qlora@tiny")
    done = rehearse(out, "--device", "cpu", "--small", "--only", ",".join(SELECTION))
    assert done.returncode == 0, done.stderr
    assert killed() == "qlora@tiny"
    return out


def rehearse(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        warm.interpreter(),
        str(SCRIPT),
        "--out",
        str(out),
        "--work",
        str(out / "work"),
        "--jobs",
        "2",
        *arguments,
        "--minutes",
        "13",
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=800)


def killing(out: Path, step: str):
    """Kills the process of `step` once it is in the state file; what is returned waits and says which was killed."""
    killed = []

    def watch() -> None:
        deadline = time.monotonic() + 800
        while time.monotonic() < deadline and not killed:
            state = out / "state.json"
            running = json.loads(state.read_text()) if state.exists() else {}
            if step in running:
                os.kill(running[step], signal.SIGKILL)
                killed.append(step)
            time.sleep(0.02)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()

    def wait() -> str:
        thread.join(5)
        return killed[0] if killed else ""

    return wait


def results(out: Path) -> dict:
    return json.loads((out / "gpu.json").read_text())


def by_step(out: Path) -> dict:
    return {row["step"]: row for row in results(out)["steps"]}


def test_a_rehearsal_gives_every_row_but_that_of_the_step_that_was_killed(rehearsed):
    rows = by_step(rehearsed)
    assert rows.pop("qlora@tiny")["reason"] == "killed by SIGKILL without a result"
    known = results(rehearsed)
    assert known["machine"].keys() >= {"processor", "cores", "memory_bytes", "disk_free_bytes", "system", "python"}
    assert known["device"]["name"] == known["machine"]["processor"] and known["versions"].keys() >= {
        "polyquant",
        "torch",
    }
    nf4, dense = rows["bitsandbytes:nf4@tiny"]["facts"], rows["dense@tiny"]["facts"]
    assert abs(nf4["stored_bytes"] / nf4["planned_bytes"] - 1) < 0.01 and nf4["failed_checks"] == []
    assert 0.02 < nf4["kl"] < 1 and nf4["tg"] > 0 and dense["tg"] > 0
    assert rows["bitsandbytes:nf4@tiny direct"]["facts"]["tg"] > 0
    assert rows["auto@tiny"]["facts"]["bytes_on"] == {"cpu": nf4["stored_bytes"]}
    checked = rows["conformance:fp8"]["facts"]
    assert checked["failures"] == [] and sum(checked["counts"].values()) == checked["runs"] > 10
    for diagnosis in results(rehearsed)["diagnoses"]:
        if diagnosis["problems"] and f"conformance:{diagnosis['backend']}" in rows:
            row = rows[f"conformance:{diagnosis['backend']}"]
            assert row["status"] == "not run" and row["reason"].startswith(diagnosis["problems"][0]["what"])


def test_the_table_of_a_rehearsal_holds_every_step(rehearsed):
    table = (rehearsed / "gpu.md").read_text()
    for heading in ("## Backends", "## Models and candidates", "## Training", "## Placement"):
        assert heading in table
    assert "Small sizes: a rehearsal" in table and "| qlora@tiny |" in table and "| bitsandbytes:nf4@tiny |" in table
    assert str(rehearsed) not in (rehearsed / "gpu.json").read_text().replace('"said"', "")
    assert not (rehearsed / "work").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "step",
    ["doctor", "model:tiny", "conformance:fp8", "dense@tiny", "checkpoint:compressed-tensors:int4@tiny",
     "bitsandbytes:nf4@tiny", "bitsandbytes:nf4@tiny direct", "auto@tiny", "qlora@tiny"],
)  # fmt: skip
def test_each_step_killed_leaves_the_others(rehearsed, tmp_path, step):
    killed = killing(tmp_path, step)
    rehearse(tmp_path, "--device", "cpu", "--small", "--only", ",".join(SELECTION))
    assert killed() == step
    rows, before = by_step(tmp_path), by_step(rehearsed)
    assert rows[step]["reason"].startswith("killed by SIGKILL")
    if step == "doctor":
        return  # what is known of the machine is what the others stand on
    assert rows.keys() == before.keys()
    hit = {step}
    for name, row in rows.items():
        if row["reason"].startswith(tuple(f"after {each}:" for each in hit)):
            hit.add(name)
    for name in rows.keys() - hit - {"qlora@tiny"}:
        assert rows[name]["status"] == before[name]["status"], (name, rows[name]["reason"])


def test_a_budget_is_of_the_card_that_is_asked_for(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.with_suffix("")))
    import placing

    rooms = [placing.room_on(device, 5) for device in ("cpu", "cuda", "cuda:0", "cuda:1")]
    assert rooms == [{"cpu": 5}, {0: 5}, {0: 5}, {1: 5}]


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_packed_weights_stand_for_rounded_ones(method):
    code = f"""
import sys, torch
sys.path.insert(0, {str(SCRIPT.with_suffix(""))!r})
import checkpoint
weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
parts = dict(checkpoint.parts({method!r}, weight, 32))
nibbles = lambda words: torch.stack([(words.long() >> 4 * place) & 15 for place in range(8)], -1)
scales = parts["scales"].float()
if {method!r} == "gptq":
    codes = nibbles(parts["qweight"].T).reshape(64, 128).T
    zeros = nibbles(parts["qzeros"]).reshape(4, 64) + 1
    groups = parts["g_idx"].long()
else:
    back = torch.tensor(checkpoint.AWQ_ORDER).argsort()
    codes = nibbles(parts["qweight"])[..., back].reshape(128, 64)
    zeros = nibbles(parts["qzeros"])[..., back].reshape(4, 64)
    groups = torch.arange(128) // 32
stands_for = (codes - zeros[groups]) * scales[groups]
assert (stands_for - weight.T).abs().max() <= 0.501 * scales.max() + 1e-3
assert parts["qweight"].dtype == torch.int32 and len(codes.unique()) == 16
"""
    subprocess.run([warm.interpreter(), "-c", code], check=True)


@pytest.fixture
def generate(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import generate
    import generate_gpu

    return generate, generate_gpu


def measured_on_a_gpu(rehearsed: Path, out: Path) -> Path:
    """A rehearsal's results as those of a GPU."""
    device = {"kind": "cuda", "name": "A GPU", "driver": "580.1", "cuda": "13.0"}
    known = results(rehearsed)
    out.write_text(json.dumps(known | {"device": device, "asked": {**known["asked"], "small": False}}))
    return out


def test_the_docs_say_what_was_verified_where(rehearsed, tmp_path, generate):
    generate, generate_gpu = generate
    found = generate_gpu.read_gpu_run(measured_on_a_gpu(rehearsed, tmp_path / "gpu.json"))
    assert found.verified == {"fp8"}
    assert found.conditions.startswith("cuda: A GPU, driver 580.1, CUDA 13.0, Python 3")
    rows = {row[0].partition("]")[0][1:]: row for row in generate.verified_rows({}, found)}
    assert rows["fp8"][1] == "cuda" and rows["fp8"][3] == "cpu"
    assert rows["hqq"][1] == "" and rows["hqq"][3] == "cpu cuda (not reached)"
    assert "cuda (autoawq runs in an environment of its own" in rows["autoawq"][3]


def test_a_failed_check_verifies_nothing(rehearsed, tmp_path, generate):
    path = measured_on_a_gpu(rehearsed, tmp_path / "gpu.json")
    changed = json.loads(path.read_text())
    (row,) = [row for row in changed["steps"] if row["step"] == "conformance:fp8"]
    row["facts"]["counts"] |= {"failed": 2}
    path.write_text(json.dumps(changed))
    found = generate[1].read_gpu_run(path)
    assert not found.verified and found.reasons["fp8"] == f"2 of {row['facts']['runs']} checks fail"
    assert generate[1].why_not({"status": "done", "reason": "", "facts": {}}) == "no check applied"


def test_the_docs_refuse_a_rehearsal_and_another_schema(rehearsed, tmp_path, generate):
    _, generate_gpu = generate
    assert generate_gpu.read_gpu_run(tmp_path / "gpu.json") is None
    with pytest.raises(SystemExit, match="is a rehearsal"):
        generate_gpu.read_gpu_run(rehearsed / "gpu.json")
    path = tmp_path / "gpu.json"
    asked = {"device": "cuda", "small": False}
    doctor = {"step": "doctor", "kind": "machine", "status": "not run", "reason": "no GPU: torch sees none"}
    path.write_text(json.dumps({"schema": 1, "asked": asked, "steps": [doctor]}))
    with pytest.raises(SystemExit, match="ended before any backend was looked at: no GPU: torch sees none"):
        generate_gpu.read_gpu_run(path)
    path.write_text(json.dumps(results(rehearsed) | {"schema": 0}))
    with pytest.raises(SystemExit, match="has schema 0, and 1 is read"):
        generate_gpu.read_gpu_run(path)
