"""The folders of a GPU run: nobody's models or results are lost to it, and what it cannot use or write is said."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from polyquant.testing import warm

SCRIPT = Path(__file__).parent.parent / "docs" / "examples" / "gpu.py"


@pytest.fixture
def folders(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.with_suffix("")))
    import folders

    return folders


def ran(*arguments, **more):
    """The runner where no GPU is, which ends at its first step; of what it would do on one, its folders are the same."""
    command = [warm.interpreter(), str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **more)


def test_what_one_run_left_another_leaves_too(folders, tmp_path):
    first = folders.Workplace(tmp_path / "scratch")
    (first.path / "model").write_text("16 GiB")
    first.close()  # it ended, with --keep
    second = folders.Workplace(tmp_path / "scratch")
    second.tidy()
    second.close()
    assert (second.path / "model").exists()


def test_what_a_run_made_is_removed(folders, tmp_path):
    place = folders.Workplace(tmp_path / "scratch")
    (place.path / "model").write_text("16 GiB")
    place.tidy()
    place.close()
    assert not (tmp_path / "scratch").exists()


def test_two_runs_do_not_share_a_folder(folders, tmp_path):
    place = folders.Workplace(tmp_path)
    with pytest.raises(OSError, match="another run works in .*polyquant-gpu"):
        folders.Workplace(tmp_path)
    place.close()
    folders.Workplace(tmp_path).close()


def test_a_second_run_ends_before_it_touches_anything(folders, tmp_path):
    place = folders.Workplace(tmp_path / "work")
    (place.path / "model").write_text("16 GiB")
    done = ran("--device", "cpu", "--out", tmp_path / "out", "--work", tmp_path / "work")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("--out or --work cannot be used: another run works in ")
    assert (place.path / "model").exists()
    place.close()


@pytest.mark.parametrize("inside", ["", "out", "a/b"])
def test_results_do_not_lie_where_they_would_be_removed(tmp_path, inside):
    mine = tmp_path / "polyquant-gpu" / inside / "gpu.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    done = ran("--out", mine.parent, "--work", tmp_path)
    assert done.returncode == 2
    assert "--out must lie elsewhere than in" in done.stderr
    assert mine.read_text() == "precious"


@pytest.mark.parametrize("option", ["--out", "--work"])
def test_a_file_in_the_place_of_a_folder_is_said(tmp_path, option):
    (tmp_path / "file").write_text("precious")
    places = {"--out": tmp_path / "out", "--work": tmp_path / "work", option: tmp_path / "file"}
    done = ran(*[word for pair in places.items() for word in pair])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("--out or --work cannot be used: [Errno ")
    assert (tmp_path / "file").read_text() == "precious"


def test_results_that_are_not_whole_are_no_success(folders, tmp_path, monkeypatch, capsys):
    def full(path, text, **settings):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert folders.replace(tmp_path / "gpu.json", "{}") == "[Errno 28] No space left on device"
    assert not list(tmp_path.iterdir()), "nothing half is left"
    assert "gpu.json is as it was before" in capsys.readouterr().out
    assert folders.replace(tmp_path / "gpu.json", "{}") == ""


def test_a_letter_that_cannot_be_written_ends_nothing(folders, tmp_path):
    assert folders.replace(tmp_path / "gpu.md", "\udcff") == ""
    assert (tmp_path / "gpu.md").read_text() == "\\udcff"
    code = f"import sys; sys.path.insert(0, {str(SCRIPT.with_suffix(''))!r}); import folders; folders.say('é')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, env={"PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_word_that_no_step_has_is_said(tmp_path):
    given = ("--device", "cpu", "--small", "--out", tmp_path / "out", "--work", tmp_path / "work")
    done = ran(*given, "--only", "hqq, nosuchstep")
    assert done.returncode == 1
    assert "--only: no step has nosuchstep in its name; there are " in done.stderr
    assert not (tmp_path / "work").exists()
