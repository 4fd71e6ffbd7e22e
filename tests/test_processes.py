"""Child processes: they end with what they have started, and an id that may be another's by then is never signalled."""

import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest
from polyquant.support.processes import Child, run_logged
from polyquant.support.progress import SILENT

from .isolating import gone

STARTS = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def signalled(monkeypatch):
    """Whose child each process was that was signalled, at that time: it cannot be another's while it is not reaped."""
    parents, killpg = [], os.killpg

    def seen(pid, number):
        parents.append(psutil.Process(pid).ppid() if psutil.pid_exists(pid) else None)
        killpg(pid, number)

    monkeypatch.setattr(os, "killpg", seen)
    return parents


def start(code):
    return Child([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.mark.parametrize("ends", ["by itself", "killed"])
def test_what_it_has_started_ends_with_it_and_no_id_is_signalled_after_it_is_reaped(signalled, ends):
    child = start(STARTS)
    started = int(child.stdout.readline())
    if ends == "killed":
        child.kill()
    child.stdin.close()
    assert child.wait(30) == (0 if ends == "by itself" else -signal.SIGKILL)
    assert gone(started)
    before = list(signalled)
    assert set(before) == {os.getpid()}
    for _ in range(3):
        child.kill()
        assert child.poll() == child.wait() == child.returncode
    assert signalled == before
    child.stdout.close()


def test_many_threads_may_wait_and_kill(signalled):
    child = start(STARTS)
    codes = []
    threads = [threading.Thread(target=lambda: codes.append(child.wait())) for _ in range(8)]
    threads += [threading.Thread(target=child.kill) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert codes == [-signal.SIGKILL] * 8
    assert set(signalled) == {os.getpid()}
    child.stdin.close()
    child.stdout.close()


def test_time_is_up(signalled):
    child = start("import time; time.sleep(60)")
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.2)
    assert child.poll() is None
    child.kill()
    assert child.wait(30) == -signal.SIGKILL
    child.stdin.close()
    child.stdout.close()


def test_a_logged_child_is_not_signalled_once_it_has_ended(signalled, tmp_path):
    ended = run_logged("this", (), tmp_path / "log", limit_seconds=60, progress=SILENT)
    assert ended.code == 0
    assert "Zen of Python" in (tmp_path / "log").read_text()
    assert set(signalled) == {os.getpid()}
