"""The kit for a machine with a GPU: what goes into it, and how it installs without an index."""

import base64
import csv
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "docs" / "examples" / "gpu"
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def kit(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import kit

    return kit


def make_wheel(folder: Path, name: str, *, needs=(), tag="py3-none-any", files=None) -> Path:
    """A wheel of one module, as a build backend would write it."""
    own = f"{name}-1.0.dist-info"
    contents = {
        f"{name}.py": "answer = 42\n",
        **(files or {}),
        f"{own}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        + "".join(f"Requires-Dist: {need}\n" for need in needs),
        f"{own}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-1.0-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in contents.items():
            archive.writestr(path, text)
        archive.writestr(f"{own}/RECORD", "".join(f"{path},,\n" for path in [*contents, f"{own}/RECORD"]))
    return wheel


def packed(kit, folder: Path, *wheels: dict) -> Path:
    """A kit of such wheels."""
    gathered = kit.Kit(folder, kit.Target(HERE, {}, None))
    (folder / "wheels").mkdir(parents=True)
    for wheel in wheels:
        make_wheel(folder / "wheels", **wheel)
    kit.in_parts(gathered, folder / "wheels")
    return folder


def install(folder: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "install.py"), "--target", str(target)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_thinned_wheel_has_a_record_that_holds(kit, tmp_path):
    files = {"thin/libthin_cuda130.so": "kept", "thin/libthin_cuda118.so": "dropped", "thin/with,comma.txt": "kept"}
    wheel = make_wheel(tmp_path, "thin", files=files)
    assert kit.wheels.thin(wheel, lambda name: "cuda118" not in name) == ["thin/libthin_cuda118.so"]
    with zipfile.ZipFile(wheel) as archive:
        record = [row for row in csv.reader(archive.read("thin-1.0.dist-info/RECORD").decode().splitlines()) if row]
        assert sorted(row[0] for row in record) == sorted(archive.namelist())
        for name, digest, size in record[:-1]:
            content = archive.read(name)
            stated = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            assert digest == f"sha256={stated}" and int(size) == len(content)
    assert record[-1] == ["thin-1.0.dist-info/RECORD", "", ""]
    with pytest.raises(ValueError, match="holds nothing that is to be taken out"):
        kit.wheels.thin(wheel, lambda name: "cuda118" not in name)


def test_a_requirement_is_met_by_what_is_there_or_is_a_row(kit, tmp_path):
    gathered = kit.Kit(tmp_path, kit.Target("3.12", {"torch": "2.11.0", "scipy": ""}, None))

    def settle(who: str, text: str):
        return kit.settle(gathered, who, Requirement(text), {}, {})

    assert settle("hqq", "torch>=2.4") == settle("hqq", "scipy") == [] and gathered.assumed == {"scipy"}
    assert settle("gptqmodel", "torch>=2.14.1") == []
    assert gathered.conflicts == [{"who": "gptqmodel", "asks": "torch>=2.14.1", "there": "2.11.0"}]
    assert settle("sinq", "lm_eval>=0.4.11") == []
    assert gathered.left_out == [{"name": "lm-eval", "reason": kit.LEFT_OUT["lm-eval"]}]
    assert gathered.versions == {}


def test_markers_are_those_of_the_target(kit):
    target = kit.Target("3.12", {}, None)
    texts = [
        "a; python_version < '3.12'",
        "b; python_version >= '3.12'",
        "c; sys_platform == 'win32'",
        "d; extra == 'x'",
    ]
    assert [each.name for each in kit.applying([Requirement(text) for text in texts], target)] == ["b"]


def test_what_the_repository_asks_for_is_read_from_it(kit, tmp_path):
    gathered = kit.Kit(tmp_path, kit.Target("3.12", {}, None))
    asked = {(who, requirement.name) for who, requirement in kit.roots(gathered, kit.read_plugins())}
    assert {("polyquant", "msgspec"), ("polyquant", "peft"), ("polyquant-hqq", "hqq")} <= asked
    assert {name for who, name in asked if who == "polyquant-autoawq"} == set()
    assert any(row["name"] == "autoawq" and "transformers 4.51" in row["reason"] for row in gathered.left_out)
    pins = kit.read_pins()
    assert pins["torchao"] and all(pins.values())


def test_large_wheels_go_into_parts_and_none_may_exceed_one(kit, tmp_path, monkeypatch):
    monkeypatch.setattr(kit, "PART_BYTES", 7000)
    sized = [{"name": f"w{size}", "files": {"x": "a" * size}} for size in (4000, 3500, 900)]
    folder = packed(kit, tmp_path / "kit", *sized)
    parts = {row["name"]: row["part"] for row in json.loads((folder / "manifest.json").read_text())["wheels"]}
    assert parts == {"w4000": "part1", "w3500": "part2", "w900": "part1"}
    assert install(folder, tmp_path / "site").returncode == 0
    with pytest.raises(SystemExit, match="more than a part of 7000"):
        packed(kit, tmp_path / "other", {"name": "huge", "files": {"x": "a" * 9000}})


def test_what_is_shown_of_a_kit_is_what_its_manifest_says(kit, tmp_path, capsys):
    folder = packed(kit, tmp_path / "kit", {"name": "a"}, {"name": "b"})
    total = sum(row["bytes"] for row in json.loads((folder / "manifest.json").read_text())["wheels"])
    kit.show(kit.Kit(folder, kit.Target(HERE, {}, None)))
    assert f"2 wheels, {total} bytes (0.0 MiB), 1 part(s): {folder}" in capsys.readouterr().out


def test_a_kit_installs_without_an_index_and_says_what_is_not_met(kit, tmp_path):
    needs = ("b>=1.0", "missing-thing", "pip<1", "only-there; extra == 'more'")
    folder = packed(kit, tmp_path / "kit", {"name": "a", "needs": needs}, {"name": "b"})
    done = install(folder, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert "2 wheels in" in done.stdout and (tmp_path / "site" / "a.py").exists()
    unmet = [line.strip() for line in done.stdout.splitlines() if "not met" in line]
    assert len(unmet) == 2 and unmet[0].startswith("not met: a asks for pip<1, and there is ")
    assert unmet[1] == "not met: missing-thing is not installed; asked for by a"


def test_a_changed_or_missing_wheel_installs_nothing(kit, tmp_path):
    folder = packed(kit, tmp_path / "kit", {"name": "a"}, {"name": "b"})
    with (folder / "part1" / "a-1.0-py3-none-any.whl").open("ab") as file:
        file.write(b"x")
    (folder / "part1" / "b-1.0-py3-none-any.whl").unlink()
    done = install(folder, tmp_path / "site")
    assert done.returncode == 1 and not (tmp_path / "site").exists()
    assert "part1/a-1.0-py3-none-any.whl is not the file that was packed: copy the kit again" in done.stderr
    assert "part1/b-1.0-py3-none-any.whl is not here: bring that part along" in done.stderr


def test_a_kit_for_another_python_says_so(kit, tmp_path):
    folder = packed(kit, tmp_path / "kit", {"name": "a", "tag": "cp39-cp39-any"})
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"python": "3.9"}))
    done = install(folder, tmp_path / "site")
    assert done.returncode == 1 and f"pack it again with: python -m nox -s gpu_kit -- --python {HERE}" in done.stderr


def test_what_is_there_is_read_as_pip_writes_it(kit, tmp_path):
    listed = tmp_path / "there.txt"
    listed.write_text("# a comment\nTorch==2.11.0+cu130\n\nPy_Yaml  # version not known\n")
    assert kit.read_there(listed) == {"torch": "2.11.0", "py-yaml": ""}
    assert kit.read_there(SCRIPTS / "there.txt")["torch"] == "2.11.0"


@pytest.mark.slow
def test_the_kit_for_this_python_installs_into_an_empty_environment(tmp_path):
    """Fetches from the index: minutes."""
    command = [sys.executable, str(SCRIPTS / "kit.py"), "--out", str(tmp_path / "kit"), "--python", HERE, "--try"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "backends: aqlm, auto-round" in done.stdout
    manifest = json.loads((tmp_path / "kit" / "manifest.json").read_text())
    total = sum(row["bytes"] for row in manifest["wheels"])
    assert total <= 60 * 2**20 and {"bitsandbytes", "torchao", "polyquant"} <= {
        row["name"] for row in manifest["wheels"]
    }
    shutil.rmtree(tmp_path / "kit")
