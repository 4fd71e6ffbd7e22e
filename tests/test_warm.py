"""Processes that have torch and transformers imported behave as fresh ones do otherwise."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from polyquant.testing import warm

LOOKS = """
import json, os, sys
print(json.dumps([sys.argv, os.getcwd(), os.environ.get("COLOUR"), sys.stdin.read(), __name__, "torch" in sys.modules,
                  os.getppid(), os.getsid(0) == os.getpid(), "polyquant" in sys.modules, sys.path[:2]]))
print("to the other", file=sys.stderr)
"""


def run(*command, seconds=300, environment=warm.ENVIRONMENT, **more):
    return warm.run(command, seconds=seconds, environment=environment, **more)


def looked(found):
    import json

    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_a_program_has_its_arguments_folder_and_variables(tmp_path):
    variables = {**warm.ENVIRONMENT, "COLOUR": "blue", "PYTHONPATH": f"{tmp_path}/a"}
    found = run("-c", LOOKS, "one", "two words", environment=variables, folder=tmp_path)
    arguments, folder, colour, read, name, torch, _, leads, own, path = looked(found)
    assert (arguments, folder, colour, read, name) == (
        ["-c", "one", "two words"],
        str(tmp_path),
        "blue",
        "",
        "__main__",
    )
    assert (torch, leads, own, path) == (True, True, False, ["", f"{tmp_path}/a"])
    assert found.stderr == "to the other\n"


def test_one_process_forks_for_all_and_no_program_sees_another():
    first = looked(run("-c", f"import os, sys; os.environ['COLOUR'] = 'red'; sys.path.clear()\n{LOOKS}"))
    second = looked(run("-c", LOOKS))
    assert first[6] == second[6] != os.getpid()
    assert second[2] is None
    assert second[9]


def test_a_module_runs_as_the_program(tmp_path):
    (tmp_path / "colours.py").write_text(f"import sys\n{LOOKS}\nsys.exit(7)")
    found = run("-m", "colours", "blue", folder=tmp_path)
    assert found.returncode == 7
    assert "colours.py" in found.stdout
    assert '"__main__", true' in found.stdout


@pytest.mark.parametrize(
    ("code", "ended", "said"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('no')", 1, "no"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import os; os._exit(5)", 5, ""),
        ("import atexit, os; atexit.register(os._exit, 6)", 6, ""),
    ],
)
def test_however_a_program_ends_its_code_and_words_are_those_of_a_fresh_one(code, ended, said):
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    found = run("-c", code)
    assert found.returncode == fresh.returncode == ended
    assert said in found.stderr
    assert found.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]
    assert looked(run("-c", LOOKS))  # the next one runs


def test_a_program_that_takes_too_long_is_killed_with_what_it_started(tmp_path):
    code = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
time.sleep(60)
"""
    with pytest.raises(subprocess.TimeoutExpired):
        run("-c", code, seconds=2)
    child = int((tmp_path / "child").read_text())
    until = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert looked(run("-c", LOOKS))


def test_variables_that_imports_read_need_a_fresh_python():
    found = looked(run("-c", LOOKS, environment={**warm.ENVIRONMENT, "HF_HOME": "/nowhere"}))
    assert (found[5], found[6]) == (False, os.getpid())


def test_what_test_files_import_leaves_nothing_that_keeps_others_from_a_fork(tmp_path):
    """Of the variables that libraries read on import; one that a test file sets for its processes stays."""
    (tmp_path / "test_own.py").write_text(
        "import os\nos.environ.update(HF_OF_A_LIBRARY='1', COLOUR='blue')\n"
        "def test_it():\n    assert ('HF_OF_A_LIBRARY' in os.environ, os.environ['COLOUR']) == (False, 'blue')\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    command = ["-m", "pytest", "-q", "-p", "garbage", "-p", "no:cacheprovider", "-c", os.devnull, str(tmp_path)]
    found = run(*command, environment={**warm.ENVIRONMENT, "PYTHONPATH": path}, folder=tmp_path, seconds=300)
    assert found.returncode == 0, found.stdout + found.stderr
