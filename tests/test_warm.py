"""Processes that have torch and transformers imported behave as fresh ones do otherwise."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
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
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
time.sleep(600)
"""
    with pytest.raises(subprocess.TimeoutExpired):
        run("-c", code, seconds=2)
    child = int((tmp_path / "child").read_text())
    until = time.monotonic() + 300
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


def test_a_file_runs_as_the_program(tmp_path):
    (tmp_path / "colours.py").write_text(LOOKS)
    arguments, *_, path = looked(run(str(tmp_path / "colours.py"), "blue"))
    assert (arguments, path[0]) == ([str(tmp_path / "colours.py"), "blue"], str(tmp_path))


def started(code, **more):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": warm.ENVIRONMENT}
    return subprocess.Popen([warm.interpreter(), "-c", code], **pipes, **more)


def test_what_stands_for_python_passes_words_and_signals_on():
    code = (
        "import os, signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(4))\n"
        "print(os.getpid(), input(), flush=True)\nsignal.pause()"
    )
    with started(code) as process:
        process.stdin.write("to it\n")
        process.stdin.flush()
        pid, _, said = process.stdout.readline().strip().partition(" ")
        assert (said, int(pid) != process.pid) == ("to it", True)
        process.terminate()
        assert process.wait(300) == 4


def test_a_program_ends_with_what_stands_for_it():
    with started("import os, time; print(os.getpid(), flush=True); time.sleep(600)") as process:
        program = psutil.Process(int(process.stdout.readline()))
        process.kill()
        assert process.wait(300) == -9
        program.wait(300)


def test_what_a_program_starts_is_forked_too():
    code = f"import subprocess, sys; print(subprocess.check_output([sys.executable, '-c', {LOOKS!r}], text=True))"
    found = looked(run("-c", code))
    assert found[5] and found[6] != os.getpid()
    assert looked(run("-c", code.replace("sys.executable, ", "sys.executable, '-S', ")))[5] is False


def test_what_a_program_starts_warm_is_forked_by_the_same_process():
    code = f"from polyquant.testing import warm; print(warm.run(['-c', {LOOKS!r}], seconds=60).stdout)"
    found = looked(
        run("-c", code, environment={**warm.ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    )
    assert found[5] and found[6] == looked(run("-c", LOOKS))[6]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import atexit; atexit.register(print, 'last'); print('first')", "first\nlast\n"),
        ("import threading as t, time; t.Thread(target=lambda: (time.sleep(.2), print('late'))).start()", "late\n"),
        ("import os; file = os.fdopen(os.dup(1), 'w'); file.write('never flushed')", "never flushed"),
        ("import ctypes; ctypes.CDLL(None).printf(b'of C')", "of C"),
        ("import tempfile; folder = tempfile.TemporaryDirectory(); print(folder.name)", None),
    ],
)
def test_what_ends_with_a_program_ends(code, said):
    found = run("-c", code)
    assert (found.returncode, found.stderr) == (0, "")
    if said is None:
        assert not Path(found.stdout.strip()).exists()
    else:
        assert found.stdout == said


def test_an_interrupted_program_ends_as_a_fresh_one():
    # which is ignored where a shell runs the tests in the background
    begins = "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nprint(1, flush=True)\n"
    with started(f"{begins}time.sleep(600)", stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == -signal.SIGINT
        assert process.stderr.read().splitlines()[-1] == "KeyboardInterrupt"


PRODUCT = "import torch; torch.set_num_threads(2); print(float((torch.ones(400, 400) @ torch.ones(400, 400)).sum()))"
NESTED = f"import subprocess, sys; {PRODUCT}; subprocess.run([sys.executable, '-c', {PRODUCT!r}], check=True)"
FORKED = "import multiprocessing as m; p = m.get_context('fork').Process(target=print, args=(7,)); p.start(); p.join()"


@pytest.fixture
def pool_of_threads():
    """What computes products in this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("pool_of_threads")
def test_many_at_once_compute_start_others_and_leave_nothing():
    """What forks never computes: a pool of threads would not live on in a fork."""
    assert float((torch.ones(400, 400) @ torch.ones(400, 400)).sum()) == 400.0**3
    assert looked(run("-c", LOOKS))
    (server,) = (each for each in psutil.Process().children() if "serve" in each.cmdline())
    before = server.num_fds()

    def cut_short(_):
        with pytest.raises(subprocess.TimeoutExpired):
            run("-c", "import time; time.sleep(600)", seconds=0.1)

    with ThreadPoolExecutor(4) as pool:
        said = [(code, pool.submit(run, "-c", f"import sys; {code}")) for code in (NESTED, FORKED) * 6]
        list(pool.map(cut_short, range(6)))
        for code, each in said:
            found = each.result(300)
            assert (found.returncode, found.stdout.split()) == (0, ["64000000.0"] * 2 if code == NESTED else ["7"])
    until = time.monotonic() + 300
    while server.children(recursive=True) or server.num_fds() > before:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert server.num_threads() == 1
