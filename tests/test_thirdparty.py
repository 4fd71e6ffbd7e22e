"""A backend from outside: a distribution of its own, installed with pip, used in other processes, uninstalled."""

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from polyquant.authoring.new import TEMPLATE, new_backend
from polyquant.testing.models import tiny_model

QUERY = """
import json, sys, polyquant
listed = [info.name for info in polyquant.backends()]
found = [info.name for info in polyquant.backends(bits=8, on_the_fly=True, trains=True, device="cpu")]
heavy = sorted({"torch", "transformers", "polyquant_rowwise._load"} & set(sys.modules))
print(json.dumps({"listed": listed, "found": found, "heavy": heavy}))
"""
USE = """
import json, sys, polyquant, torch
model, out = sys.argv[1:]
tokens = list(range(3, 40))
loaded = polyquant.load(model, backend="rowwise", device="cpu", scale_dtype="bfloat16", skip=("layers.0.mlp",))
report = polyquant.verify(loaded)
loaded.save(out)
again = polyquant.load(out, device="cpu")
print(json.dumps({
    "failures": [check.name for check in report.failures],
    "quantized": sorted(layer.name for layer in report.layers if layer.quantized),
    "reader": again.backend.origin,
    "passed again": polyquant.verify(again).passed,
    "equal": torch.equal(loaded.logits(tokens), again.logits(tokens)),
    "options": again.config == loaded.config,
}))
"""


class Environment:
    """A throwaway environment that sees everything installed in the running one, and what pip puts into it."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.folder = folder
        self.python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        (site,) = folder.glob("Lib/site-packages" if sys.platform == "win32" else "lib/python*/site-packages")
        outer = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
        (site / "outer.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in outer))

    def files(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}

    def pip(self, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stdout + result.stderr

    def run(self, code: str, *arguments: str | Path) -> dict:
        command = [self.python, "-W", "ignore", "-c", code, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("thirdparty") / "environment")


@pytest.fixture(scope="module")
def files_before(bare):
    assert "rowwise" not in bare.run(QUERY)["listed"]
    return bare.files()


@pytest.fixture(scope="module")
def installed(bare, files_before, tmp_path_factory):
    source = tmp_path_factory.mktemp("source") / "polyquant-rowwise"
    new_backend("rowwise", source)
    bare.pip("install", "--no-deps", "--no-build-isolation", "--no-index", source)
    shutil.rmtree(source)
    return bare


def test_it_is_listed_and_found_without_importing_torch(installed):
    answer = installed.run(QUERY)
    assert "rowwise" in answer["listed"]
    assert "rowwise" in answer["found"]
    assert answer["heavy"] == []


def test_the_command_line_knows_it(installed):
    command = [installed.python, "-m", "polyquant", "doctor", "rowwise", "--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "rowwise" in result.stdout


def test_its_promises_are_checked(installed):
    checks = ("--check", "card_is_complete", "--check", "hooks_fit_the_specification", "--check", "options_are_frozen")
    command = [installed.python, "-m", "polyquant", "check-backend", "rowwise", *checks]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "rowwise keeps its promises: of 3 checks 3 passed" in result.stdout


def test_it_loads_verifies_saves_and_loads_back(installed, tmp_path):
    answer = installed.run(USE, tiny_model("llama", tmp_path), tmp_path / "out")
    assert answer["failures"] == []
    assert answer["reader"] == "polyquant-rowwise 0.1.0"
    assert answer["passed again"]
    assert answer["equal"]
    assert answer["options"]
    assert "model.layers.1.mlp.up_proj.weight" in answer["quantized"]
    assert not [name for name in answer["quantized"] if name.startswith(("model.layers.0.mlp", "lm_head"))]


def test_uninstalling_leaves_no_trace(installed, files_before):
    assert installed.files() > files_before
    installed.pip("uninstall", "--yes", "polyquant-rowwise")
    assert installed.files() == files_before
    assert "rowwise" not in installed.run(QUERY)["listed"]


def test_it_uses_public_names_only():
    """Nothing of the core that starts with an underscore, nothing of another plugin."""
    for path in (TEMPLATE / "src").rglob("*.py"):
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["from"], ["import"]) and words[1].startswith("polyquant"):
                assert words[1].startswith(("polyquant.", "polyquant_rowwise")) or words[1] == "polyquant", line
                assert not words[1].removeprefix("polyquant").startswith("._"), line
                if not words[1].startswith("polyquant_"):
                    assert not [name for name in words[3:] if name.startswith("_")], line
