"""Folders are written all or nothing: errors, a full disk and a kill leave what was there."""

import os
import select
import signal
import subprocess
import sys

import pytest
from polyquant.errors import SaveError
from polyquant.support.files import atomic_folder, locked


@pytest.fixture
def old(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "weights").write_text("old")
    return out


def test_a_folder_appears_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with atomic_folder(out, overwrite=False) as partial:
        (partial / "weights").write_text("new")
        assert not out.exists()
    assert (out / "weights").read_text() == "new"
    assert [child.name for child in out.parent.iterdir()] == ["out"]


def test_an_existing_folder_needs_overwrite(old):
    with pytest.raises(SaveError, match=r"exists; choose another folder, or replace it with overwrite=True"):
        with atomic_folder(old, overwrite=False):
            pass
    with atomic_folder(old, overwrite=True) as partial:
        (partial / "weights").write_text("new")
    assert (old / "weights").read_text() == "new"
    assert [child.name for child in old.parent.iterdir()] == ["out"]


def test_an_error_leaves_the_old_folder_and_nothing_else(old):
    with pytest.raises(SaveError, match="failed .*boom.* MiB are free there; what was at .* is unchanged") as caught:
        with atomic_folder(old, overwrite=True) as partial:
            (partial / "weights").write_text("half")
            raise RuntimeError("boom")
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert (old / "weights").read_text() == "old"
    assert [child.name for child in old.parent.iterdir()] == ["out"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="cannot write beside"):
        with atomic_folder(tmp_path / "file" / "out", overwrite=False):
            pass


def test_a_full_disk_leaves_the_old_folder(old):
    """A file size limit makes the write fail as a full disk does, in the operating system."""
    code = f"""
import resource, pathlib
from polyquant.support.files import atomic_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with atomic_folder(pathlib.Path({str(old)!r}), overwrite=True) as partial:
    (partial / "weights").write_bytes(b"x" * 100_000)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "SaveError" in result.stderr
    assert "File too large" in result.stderr
    assert (old / "weights").read_text() == "old"
    assert [child.name for child in old.parent.iterdir()] == ["out"]


def test_a_kill_leaves_the_old_folder(old):
    code = f"""
import pathlib, time
from polyquant.support.files import atomic_folder
with atomic_folder(pathlib.Path({str(old)!r}), overwrite=True) as partial:
    (partial / "weights").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (old / "weights").read_text() == "old"
    leftovers = [child.name for child in old.parent.iterdir() if child.name != "out"]
    assert all(name.startswith(".out.partial-") for name in leftovers)


TURN = """
import sys
from pathlib import Path
from polyquant.support.files import locked
out = Path(sys.argv[1])
with locked(out):
    print("there" if out.exists() else "not there", flush=True)
    sys.stdin.readline()
    out.mkdir()
"""


def test_one_process_at_a_time_makes_a_folder_and_a_kill_frees_it(tmp_path):
    def start():
        command = [sys.executable, "-c", TURN, str(tmp_path / "deep" / "out")]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with start() as killed:
        assert killed.stdout.readline() == "not there\n"
        with start() as waiting:
            assert not select.select([waiting.stdout], [], [], 3)[0], "it has what another one has"
            killed.kill()
            assert waiting.stdout.readline() == "not there\n"
            waiting.stdin.write("\n")
    with locked(tmp_path / "deep" / "out"):
        assert (tmp_path / "deep" / "out").is_dir()


def test_a_lock_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="cannot write beside"), locked(tmp_path / "file" / "out"):
        pass
