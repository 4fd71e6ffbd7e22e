"""Work in a process of its own: its end, however bad, is an error here and not this process's end."""

import json

import pytest
from polyquant.plugin.process import run_in_process
from polyquant.errors import BackendFailed

WORKER = """
import json, os, sys
job = json.load(sys.stdin)
print("working")
open("left.log", "w").close()
if job["fails"]:
    print("the last words")
    sys.stdout.flush()
    os._exit(3)
with open(job["out"], "w") as file:
    json.dump([job, os.environ["POLYQUANT_TEST"]], file)
"""


def test_a_job_runs_and_a_crash_is_an_error(tmp_path, monkeypatch, capfd):
    (tmp_path / "polyquant_worker.py").write_text(WORKER)
    monkeypatch.syspath_prepend(tmp_path)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    job = {"fails": False, "out": str(tmp_path / "out")}
    run_in_process("polyquant_worker", job, environment={"POLYQUANT_TEST": "1"})
    assert json.loads((tmp_path / "out").read_text()) == [job, "1"]
    with pytest.raises(BackendFailed, match=r"polyquant_worker ended with code 3:\n  working\n  the last words"):
        run_in_process("polyquant_worker", job | {"fails": True})
    assert capfd.readouterr().out == ""
    run_in_process("polyquant_worker", job, shown=True, environment={"POLYQUANT_TEST": "1"})
    assert capfd.readouterr().out == "working\n"
    assert list(here.iterdir()) == []
