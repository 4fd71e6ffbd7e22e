"""Environments and workers that fail: each is an error that says what to do, and nothing is left that is used."""

import json
import os
import shutil
import subprocess
import sys
import time

import polyquant
import psutil
import pytest
import torch
from polyquant.support.libraries import installed_version
from polyquant.errors import BackendFailed, ConfigError, EnvironmentProblem
from polyquant.isolated import protocol
from polyquant.isolated.creating import create
from polyquant.isolated.environments import RECORD, Environment
from polyquant.support.progress import SILENT
from polyquant.isolated.installer import Index, commands, from_variables
from polyquant.isolated.sources import arguments_for
from polyquant.isolated.worker import Worker
from polyquant.types import Isolated

from .isolating import gone

HELLO = json.dumps({"protocol": protocol.VERSION, "polyquant": installed_version("polyquant")})


def python(isolated_rowwise, *words, **variables):
    """`python -m polyquant` with the backend, in a process of its own."""
    command = [sys.executable, "-m", "polyquant", *words]
    kept = {**os.environ, "PYTHONPATH": isolated_rowwise, **variables}
    return subprocess.Popen(command, env=kept, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def made_of(folder, script):
    """An environment whose interpreter is `script`: what a worker may do, it does."""
    found = Environment(backend="acme", isolated=Isolated(reason="a test"), installs=(), folder=folder / "acme-0")
    found.python.parent.mkdir(parents=True)
    found.python.write_text(f"#!{sys.executable}\nimport os, sys, time\n{script}")
    found.python.chmod(0o755)
    record = {"backend": "acme", "isolated": {"reason": "a test"}, "python": "3", "created": "", "installed": [],
              "stored_bytes": 0}  # fmt: skip
    (found.folder / RECORD).write_text(json.dumps(record))
    return found


def test_an_interpreter_that_vanished(tmp_path):
    found = made_of(tmp_path, "")
    found.python.unlink()
    found.python.symlink_to(tmp_path / "gone")
    assert found.problem().fix == "polyquant env create acme"
    with pytest.raises(EnvironmentProblem, match="has lost its interpreter"):
        Worker(found)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "sys.exit('no module named polyquant')",
            "(?s)is broken: .*ended with code 1.*no module named polyquant.*--again",
        ),
        ('print(\'{"protocol": 1, "polyquant": "0.0.9"}\', flush=True)', r"has polyquant 0.0.9 \(protocol 1\), and"),
        ("print('{\"protocol\": 9}', flush=True); time.sleep(60)", "has polyquant None .protocol 9."),
        ("print('a banner', flush=True); time.sleep(60)", "is broken: .*a message is no JSON object"),
    ],
    ids=["broken core", "another core", "another protocol", "no protocol"],
)
def test_an_environment_with_another_core(tmp_path, script, message):
    with pytest.raises(EnvironmentProblem, match=message):
        Worker(made_of(tmp_path, script))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b'{"result": ', "was cut short"),
        (b'{"tensor_bytes": 1000}\n' + (100).to_bytes(8, "little"), "cut short: 0 of 100 bytes came"),
        (b'{"tensor_bytes": 99999999999999}\n', "a tensor of 99999999999999 bytes; at most"),
        (b'{"tensor_bytes": 20}\n' + (2**40).to_bytes(8, "little"), "whose header has 1099511627776 of 20 bytes"),
        (b'{"tensor_bytes": 12}\n' + (4).to_bytes(8, "little") + b"null", "a tensor that is none"),
        (b"[1, 2]\n", "no JSON object"),
        (b"\xff\xfe\n", "no JSON object"),
        (b"", "it ended with code 3"),
    ],
    ids=["line", "tensor", "too large", "header", "no tensor", "list", "bytes", "nothing"],
)
def test_a_message_that_is_none_ends_the_worker(tmp_path, answer, message):
    script = f"print({HELLO!r}, flush=True); os.read(0, 1000); os.write(1, {answer!r}); os._exit(3)"
    worker = Worker(made_of(tmp_path, script))
    with pytest.raises(BackendFailed, match=f"(?s)the worker of acme is gone.*{message}"):
        worker.call("layers")
    assert worker._process.poll() is not None


def test_a_line_longer_than_the_bound_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "LINE_BYTES", 1000)
    worker = Worker(made_of(tmp_path, f"print({HELLO!r}, flush=True); os.read(0, 1000); os.write(1, b'x' * 5000)"))
    with pytest.raises(ConfigError, match="a message of .* bytes; at most 1000 go in a line"):
        worker.call("stream", prompt="x" * 2000, parameters={})
    with pytest.raises(BackendFailed, match="is longer than 1000 bytes"):
        worker.call("layers")


def test_what_a_dead_worker_started_holds_nothing_up(tmp_path):
    """A child of the worker keeps its output open; the worker's end is seen all the same."""
    script = f"print({HELLO!r}, flush=True); os.read(0, 1000)\nif os.fork():\n    os._exit(7)\ntime.sleep(600)"
    started = time.monotonic()
    with pytest.raises(BackendFailed, match="ended with code 7"):
        Worker(made_of(tmp_path, script)).call("layers")
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_pass_bit_for_bit(tmp_path, dtype):
    from safetensors.torch import load

    tensor = torch.randn(7, 33).to(dtype)
    with (tmp_path / "pipe").open("wb") as file:
        protocol.send(file.fileno(), {"result": None}, tensor)
    with (tmp_path / "pipe").open("rb") as file:
        message, read = protocol.receive(file)
    assert message == {"result": None}
    assert read.dtype == dtype
    assert torch.equal(read, tensor)
    _, content = (tmp_path / "pipe").read_bytes().split(b"\n", 1)
    assert torch.equal(load(content)["tensor"], tensor), "it is a safetensors file"


def test_the_doctor_says_how_to_make_it(isolated_rowwise):
    (problem,) = polyquant.doctor("rowwise", device="cpu")[0].problems
    assert "runs in an environment of its own, which is not there: it is a test" in problem.what
    assert problem.fix == "polyquant env create rowwise"


def test_a_killed_creation_leaves_nothing_that_is_used(isolated_rowwise):
    found = polyquant.backend("rowwise").environment
    shutil.rmtree(found.folder, ignore_errors=True)
    process = python(isolated_rowwise, "env", "create", "rowwise")
    while not (found.folder / "pyvenv.cfg").exists():
        assert process.poll() is None
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert all(gone(child.pid) for child in children)
    assert "one that was never finished is there" in found.problem().what
    with pytest.raises(EnvironmentProblem, match="polyquant env create rowwise"):
        polyquant.backend("rowwise").require("cpu")
    assert create(found, Index(), SILENT)


def test_two_creators_make_one(isolated_rowwise):
    found = polyquant.backend("rowwise").environment
    shutil.rmtree(found.folder, ignore_errors=True)
    both = [python(isolated_rowwise, "env", "create", "rowwise") for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(out.partition(":")[0].partition(" ")[0] for out, _ in said) == ["created", "there"]
    assert any("another process is making" in error for _, error in said)


def test_a_full_disk(isolated_rowwise, environment):
    """A limit on the size of files makes writing fail as a full disk does, in the operating system."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000));"
        "from polyquant.cli.main import main; sys.argv[1:] = ['env', 'create', 'rowwise', '--again']; main()"
    )
    kept = {**os.environ, "PYTHONPATH": isolated_rowwise}
    result = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "could not be made" in result.stderr
    assert "File too large" in result.stderr
    assert "MiB are free in" in result.stderr
    assert not environment.folder.exists()
    create(environment, Index(), SILENT)


def test_a_cache_that_cannot_be_written(isolated_rowwise):
    process = python(isolated_rowwise, "env", "create", "rowwise", POLYQUANT_CACHE=f"{os.devnull}/cache")
    _, error = process.communicate()
    assert process.returncode == 2
    assert f"POLYQUANT_CACHE is {os.devnull}/cache, and {os.devnull} is no folder; set it to one" in error


def test_no_index(isolated_rowwise, environment):
    nowhere = {"PIP_NO_INDEX": "0", "PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_RETRIES": "0", "PIP_FIND_LINKS": "",
               "PIP_CONFIG_FILE": os.devnull}  # fmt: skip
    process = python(isolated_rowwise, "env", "create", "rowwise", "--again", **nowhere)
    _, error = process.communicate()
    assert process.returncode == 1
    assert "the installer said last" in error
    assert "polyquant-outer" in error
    assert "--find-links FOLDER with --no-index" in error
    create(environment, Index(), SILENT)


def test_what_is_made_is_removed(isolated_rowwise, environment):
    process = python(isolated_rowwise, "env", "remove", "rowwise")
    assert process.communicate()[0].strip() == f"removed {environment.folder}"
    assert not environment.folder.exists()
    again = python(isolated_rowwise, "env", "remove", "rowwise")
    assert "there is no environment of rowwise" in again.communicate()[1]
    create(environment, Index(), SILENT)


def test_other_pins_are_another_environment(isolated_rowwise, monkeypatch):
    from polyquant.isolated.environments import environment_of

    info = polyquant.registry.installed.registry().info("rowwise")
    same = environment_of(info, "polyquant-rowwise")
    assert same.name == polyquant.backend("rowwise").environment.name
    import msgspec

    isolated = msgspec.structs.replace(info.isolated, requirements=("polyquant-outer==1.1",))
    other = environment_of(msgspec.structs.replace(info, isolated=isolated), "polyquant-rowwise")
    assert other.name != same.name
    assert other.name.startswith("rowwise-")


def test_indexes_are_passed_on_to_uv_and_pip(isolated_rowwise):
    found = polyquant.backend("rowwise").environment
    index = Index(constraint=("c.txt",), extra_index_url=("https://example.org/simple",), no_index=True)
    for uv in ("/usr/bin/uv", ""):
        made_by = [command.words for command in commands(found, index, uv=uv)]
        for words in made_by[1:]:
            assert {"--constraint", "c.txt", "--extra-index-url", "https://example.org/simple", "--no-index"} <= set(
                words
            )
        assert made_by[0][0] == (uv or sys.executable)
    variables = {"PIP_EXTRA_INDEX_URL": "https://a https://b", "PIP_NO_INDEX": "1", "PIP_CONSTRAINT": "c.txt"}
    assert from_variables(variables) == [
        "--extra-index-url", "https://a", "--extra-index-url", "https://b", "--constraint", "c.txt", "--no-index",
    ]  # fmt: skip


@pytest.mark.parametrize("uv", ["/usr/bin/uv", ""], ids=["uv", "pip"])
def test_the_commands_leave_imports_as_they_are(run_python, uv):
    """Libraries that import setuptools later, such as gptqmodel, did not import any more."""
    code = f"""
from pathlib import Path
from polyquant.isolated.environments import Environment
from polyquant.isolated.installer import Index, commands
from polyquant.types import Isolated
isolated = Isolated(reason="a test", requirements=("acme==1",))
commands(Environment(backend="acme", isolated=isolated, installs=(), folder=Path("acme-0")), Index(), uv={uv!r})
import setuptools, distutils.core
assert "_distutils" in distutils.core.__file__
"""
    done = run_python(code=code)
    assert done.returncode == 0, done.stderr


def test_the_core_comes_from_where_it_is_here():
    words = arguments_for("polyquant")
    assert words[-1] == f"polyquant=={installed_version('polyquant')}" or os.path.isdir(words[-1])
    assert arguments_for("pytest") == (f"pytest=={installed_version('pytest')}",)
