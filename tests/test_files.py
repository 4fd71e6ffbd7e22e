"""Folders are written all or nothing: errors, a full disk and a kill leave what was there, and what is not ours stays."""

import errno
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from polyquant.authoring.new import new_backend
from polyquant.errors import SaveError
from polyquant.support import files
from polyquant.support.files import atomic_folder, locked, make_folder, write_atomically


def write(out, text, **more):
    with atomic_folder(out, overwrite=True, **more) as partial:
        (partial / "weights").write_text(text)
    return out


@pytest.fixture
def old(tmp_path):
    """An output of ours."""
    return write(tmp_path / "out", "old")


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
    with pytest.raises(SaveError, match=r"failed \(boom\); what was at .* is unchanged") as caught:
        with atomic_folder(old, overwrite=True) as partial:
            (partial / "weights").write_text("half")
            raise RuntimeError("boom")
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert (old / "weights").read_text() == "old"
    assert [child.name for child in old.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_only_where_the_disk_is_full_its_room_is_told(old, number):
    with pytest.raises(SaveError, match=r"failed \(.*\); \d+ MiB are free there; what was at .* is unchanged"):
        with atomic_folder(old, overwrite=True):
            try:
                raise OSError(number, os.strerror(number))
            except OSError as error:
                raise RuntimeError("the library's own words") from error
    with pytest.raises(SaveError, match=r"cannot write .*\)$"):
        write_atomically(old / "no" / "folder", "text")


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


def test_only_an_empty_folder_or_an_output_of_ours_is_replaced(tmp_path, old):
    theirs = tmp_path / "thesis"
    theirs.mkdir()
    write(theirs, "new")
    assert (theirs / "weights").read_text() == "new"
    assert (write(old, "new") / "weights").read_text() == "new"
    (old / "notes.txt").write_text("mine")
    with pytest.raises(
        SaveError, match=r"out is not replaced: it holds what was not written by polyquant \(notes.txt\)"
    ):
        write(old, "newer")
    assert (old / "weights").read_text() == "new"
    assert (old / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "names", [["thesis.tex"], ["config.json", "model.safetensors"], [".git"], ["polyquant.json", "thesis"]]
)
def test_what_others_wrote_is_not_replaced(tmp_path, names):
    out = tmp_path / "out"
    out.mkdir()
    for name in names:
        (out / name).write_text("{}")
    with pytest.raises(SaveError, match=f"out is not replaced: .*{names[-1]}.*Choose another folder, or delete this"):
        write(out, "new")
    assert {path.name for path in out.iterdir()} == set(names)
    assert [child.name for child in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "earlier",
    [
        {"polyquant.json": {}, "adapter_config.json": {}, "README.md": {}},
        {"reference.json": {}, "window-00000.safetensors": {}},
        {"config.json": {"quantization_config": {"skip_modules": []}}, "model.safetensors": {}},
    ],
    ids=["adapter", "reference", "calibrated"],
)
def test_what_an_earlier_release_wrote_is_recognized_by_its_contents(tmp_path, earlier):
    out = tmp_path / "out"
    out.mkdir()
    for name, content in earlier.items():
        (out / name).write_text(json.dumps(content))
    assert (write(out, "new") / "weights").read_text() == "new"
    assert not any((out / name).exists() for name in earlier)


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SaveError, match="out is not replaced: it is no folder"):
        write(tmp_path / "out", "new")
    assert (tmp_path / "out").read_text() == "mine"


def test_what_is_read_is_not_replaced_nor_what_holds_it(tmp_path, old, monkeypatch):
    inner = write(old / "inner", "source")
    (tmp_path / "linked").symlink_to(inner / "weights")
    for kept in (old, inner, inner / "weights", tmp_path / "linked"):
        with pytest.raises(SaveError, match="is read from there"):
            write(old, "new", keeps=[kept])
    monkeypatch.chdir(inner)
    for out in (old, inner, tmp_path):
        with pytest.raises(SaveError, match="the working directory is in it"):
            write(out, "new")
    assert (inner / "weights").read_text() == "source"


def test_a_link_to_an_output_stays_a_link(tmp_path, old):
    (tmp_path / "link").symlink_to(old)
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (old / "weights").read_text() == "new"


def test_a_new_backend_is_its_authors(tmp_path):
    new_backend("acme", tmp_path / "out")
    with pytest.raises(SaveError, match="what is in it was not written by polyquant"):
        write(tmp_path / "out", "new")


@pytest.fixture
def renames(monkeypatch):
    """Ctrl-C comes after so many renames: the list gives how many, and then holds where they went."""
    done, rename, last = [], Path.rename, []

    def counting(self, target):
        result = rename(self, target)
        done.append(target)
        if [len(done)] == last:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Path, "rename", counting)
    return last, done


@pytest.mark.parametrize(("steps", "there"), [(1, "old"), (2, "new")])
def test_an_interrupt_between_two_renames_loses_nothing(old, monkeypatch, renames, steps, there):
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)  # as on a disk that cannot
    renames[0].append(steps)
    with pytest.raises(KeyboardInterrupt):
        write(old, "new")
    assert (old / "weights").read_text() == there
    renames[0].clear()
    assert (write(old, "newest") / "weights").read_text() == "newest"
    assert [child.name for child in old.parent.iterdir()] == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_two_folders_change_places_in_one_step(old, renames):
    assert (write(old, "new") / "weights").read_text() == "new"
    assert renames[1] == []


def test_what_a_killed_writer_left_is_removed_by_the_next(old):
    """Killed while it writes, and between two renames on a disk that cannot exchange."""
    for name, text in ((".out.partial-gone", "half"), (".out.before-gone", "older"), (".outer.partial-live", "other")):
        (old.parent / name).mkdir()
        (old.parent / name / "weights").write_text(text)
    write(old, "new")
    assert sorted(child.name for child in old.parent.iterdir()) == [".outer.partial-live", "out"]
    old.rename(old.parent / ".out.before-gone")
    with pytest.raises(SaveError, match="out exists"), atomic_folder(old, overwrite=False):
        pass
    assert (old / "weights").read_text() == "new"


WRITER = """
import sys
from pathlib import Path
from polyquant.support.files import atomic_folder
with atomic_folder(Path(sys.argv[1]), overwrite="overwrite" in sys.argv) as partial:
    (partial / "weights").write_text("first")
    print("writing", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_second_writer_is_refused_and_takes_nothing_from_the_first(tmp_path, overwrite):
    out = tmp_path / "out"
    command = [sys.executable, "-c", WRITER, str(out), *(["overwrite"] if overwrite else [])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "writing\n"
        with pytest.raises(SaveError, match="another process is writing .*out; wait for it, or choose another folder"):
            with atomic_folder(out, overwrite=overwrite):
                pass
        first.stdin.write("\n")
    assert (out / "weights").read_text() == "first"
    assert [child.name for child in tmp_path.iterdir()] == ["out"]


def test_the_claim_of_a_killed_writer_is_free(tmp_path):
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as killed:
        assert killed.stdout.readline() == "writing\n"
        killed.kill()
    assert {child.name.partition("partial-")[0] for child in tmp_path.iterdir()} == {".out."}
    assert (write(out, "new") / "weights").read_text() == "new"
    assert [child.name for child in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="the folder .*file/deep cannot be made: .*Not a directory"):
        make_folder(tmp_path / "file" / "deep")
