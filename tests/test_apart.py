"""Work in a process of its own: its end, however bad, is an error here and not this process's end."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from polyquant.errors import BackendFailed
from polyquant.plugin.process import kept_processes, run_in_process
from polyquant.support.processes import import_path

from .isolating import gone

WORKER = """
import json, os

def main(job):
    print("working")
    open("left.log", "w").close()
    if job["fails"]:
        print("the last words", flush=True)
        os._exit(3)
    with open(job["out"], "w") as file:
        json.dump([job, os.environ["POLYQUANT_TEST"], os.getpid(), os.listdir()], file)
"""


@pytest.fixture
def works(tmp_path, monkeypatch):
    """A module whose jobs are done, and what they are: `done()` gives what the last one found."""
    (tmp_path / "polyquant_worker.py").write_text(WORKER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("POLYQUANT_TEST", "0")
    job = {"fails": False, "out": str(tmp_path / "out")}
    return SimpleNamespace(job=job, done=lambda: json.loads((tmp_path / "out").read_text()))


def test_a_job_runs_and_a_crash_is_an_error(works, tmp_path, monkeypatch, capfd):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    run_in_process("polyquant_worker", works.job, environment={"POLYQUANT_TEST": "1"})
    job, variable, process, files = works.done()
    assert (job, variable, files) == (works.job, "1", ["left.log"])
    assert process != os.getpid()
    with pytest.raises(BackendFailed, match=r"polyquant_worker ended with code 3:\n  working\n  the last words"):
        run_in_process("polyquant_worker", works.job | {"fails": True})
    assert capfd.readouterr() == ("", "")
    run_in_process("polyquant_worker", works.job, shown=True)
    assert capfd.readouterr() == ("", "working\n")
    assert list(here.iterdir()) == []


def test_a_module_that_cannot_be_imported_is_an_error():
    with pytest.raises(BackendFailed, match=r"(?s)polyquant_nothing ended with code 1:.*No module named"):
        run_in_process("polyquant_nothing", {})


def test_kept_processes_do_one_job_after_the_other(works, monkeypatch):
    def process(**environment):
        run_in_process("polyquant_worker", works.job, environment=environment)
        _, _, process, files = works.done()
        assert files == ["left.log"]  # the folder is a new one
        return process

    with kept_processes():
        first = process()
        with kept_processes():
            assert process() != first
        monkeypatch.setenv("POLYQUANT_TEST", "2")
        assert process() == first
        assert works.done()[1] == "2"
        second = process(POLYQUANT_TEST="1")
        assert second != first
        assert not psutil.pid_exists(first)  # one of a module is kept
        with pytest.raises(BackendFailed, match="the last words"):
            run_in_process("polyquant_worker", works.job | {"fails": True})
        assert not psutil.pid_exists(second)
        second = process()
    assert not psutil.pid_exists(second)
    assert process() != second


def test_an_interrupted_job_ends_its_process(works, tmp_path, monkeypatch):
    """As Ctrl-C does while it works."""

    def interrupted(self, job):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, kept_processes():
        run_in_process("polyquant_worker", works.job)
        first = works.done()[2]
        patch.setattr("polyquant.plugin.process._Worker.does", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_in_process("polyquant_worker", works.job)
        assert not psutil.pid_exists(first)


BUSY = """
import os, subprocess, sys, time

def main(job):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with open(job["out"], "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    os.rename(job["out"], job["ready"])
    time.sleep(60)
"""
STARTS_ONE = """
import sys
from polyquant.plugin.process import run_in_process
run_in_process("polyquant_busy", {"out": sys.argv[1] + ".part", "ready": sys.argv[1]})
"""


def test_a_job_ends_with_the_process_that_is_killed_while_it_waits(tmp_path):
    (tmp_path / "polyquant_busy.py").write_text(BUSY)
    ready, path = tmp_path / "ready", os.pathsep.join((str(tmp_path), import_path()))
    parent = subprocess.Popen([sys.executable, "-c", STARTS_ONE, str(ready)], env={**os.environ, "PYTHONPATH": path})
    try:
        until = time.monotonic() + 60
        while not ready.exists() and parent.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        assert ready.exists()
    finally:
        parent.kill()
        parent.wait()
    worker, child = map(int, ready.read_text().split())
    assert gone(worker)
    assert gone(child)
