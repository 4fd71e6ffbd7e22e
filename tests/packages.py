"""Distributions as they are published: `nox -s release` has built them into dist/ and installed them here."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from email import message_from_string
from email.message import Message
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

import polyquant
from polyquant.testing import tiny_model

ROOT = Path(__file__).parent.parent
WHEELS = sorted((ROOT / "dist").glob("*.whl"))
SDISTS = sorted((ROOT / "dist").glob("*.tar.gz"))
PROJECTS = [ROOT, ROOT / "core" / "kernels", *(path.parent for path in sorted(ROOT.glob("plugins/*/pyproject.toml")))]
BESIDE = {"core", "LICENSE", "README.md", "pyproject.toml", "PKG-INFO", ".gitignore"}
"""What the core's source distribution holds."""


def metadata_of(wheel: Path) -> Message:
    with ZipFile(wheel) as file:
        (name,) = (each for each in file.namelist() if each.endswith(".dist-info/METADATA"))
        return message_from_string(file.read(name).decode())


def test_every_project_is_there_twice():
    names = {tomllib.loads((path / "pyproject.toml").read_text())["project"]["name"] for path in PROJECTS}
    assert {metadata_of(path)["Name"] for path in WHEELS} == names
    assert len(WHEELS) == len(SDISTS) == len(names)


@pytest.mark.parametrize("wheel", WHEELS, ids=lambda path: path.name.partition("-")[0])
def test_a_wheel_says_what_it_is(wheel):
    said = metadata_of(wheel)
    assert said["Version"] == polyquant.__version__
    assert said["License-Expression"] == "Apache-2.0"
    assert said["Summary"]
    assert len(said.get_payload()) > 300
    with ZipFile(wheel) as file:
        assert any(name.endswith("licenses/LICENSE") and file.getinfo(name).file_size > 10_000
                   for name in file.namelist())  # fmt: skip
        strays = [name for name in file.namelist() if not name.startswith("polyquant")]
        assert not strays
    for text in said.get_all("Requires-Dist", []):
        asked = Requirement(text)
        if asked.name.startswith("polyquant"):
            assert asked.specifier.contains(polyquant.__version__)
            assert not asked.specifier.contains("0.2"), f"{text}: the next minor version may be another contract"


def test_the_cores_source_holds_the_core():
    (sdist,) = (path for path in SDISTS if path.name.startswith("polyquant-"))
    with tarfile.open(sdist) as file:
        paths = [Path(name).parts[1:] for name in file.getnames()]
    assert {parts[0] for parts in paths if parts} <= BESIDE
    assert {parts[1] for parts in paths if len(parts) > 1} == {"polyquant"}


def test_what_runs_is_what_was_built():
    assert Path(polyquant.__file__).is_relative_to(sysconfig.get_path("purelib"))
    assert (Path(polyquant.__file__).parent / "py.typed").exists()
    assert len(metadata.entry_points(group="polyquant.backends")) > 25


def cli(*words: str, folder: Path) -> str:
    command = [sys.executable, "-m", "polyquant", *words]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_every_backend_is_listed_and_a_plugin_is_written(tmp_path):
    listed = {card["name"] for card in json.loads(cli("backends", "--json", folder=tmp_path))["backends"]}
    assert listed == {point.name for point in metadata.entry_points(group="polyquant.backends")}
    cli("new-backend", "acme", folder=tmp_path)
    assert (tmp_path / "polyquant-acme" / "src" / "polyquant_acme" / "plugin.py").exists()


def test_a_model_is_quantized_verified_and_saved(tmp_path):
    loaded = polyquant.load(tiny_model("llama", tmp_path / "tiny"), "bitsandbytes:nf4", device="cpu", kernel="packed")
    assert polyquant.verify(loaded, max_new_tokens=2).passed
    assert "plain torch" not in loaded.kernel, "the compiled kernels are not used"
    loaded.save(tmp_path / "saved")
    assert polyquant.load(tmp_path / "saved", device="cpu").layers
