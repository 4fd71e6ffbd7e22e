"""The environment check tells its causes apart, each in an environment made for it."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import polyquant
import polyquant_bitsandbytes
import pytest

SOURCES = [str(Path(package.__file__).parent.parent) for package in (polyquant, polyquant_bitsandbytes)]
CHECK = """
import json, polyquant
print(json.dumps([[p.kind, p.what, p.fix, p.detail] for p in polyquant.backend("bitsandbytes").problems({device!r})]))
"""


@pytest.fixture
def problems_without(tmp_path):
    """Problems in a copy of this environment, made of links, that lacks some distributions and has some files changed."""

    def check(
        *missing: str, files: dict[str, str] | None = None, device: str = "cpu", code: str = CHECK
    ) -> list[list[str]]:
        site = tmp_path / "site"
        site.mkdir()
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not entry.name.startswith(missing) and not entry.name.startswith("__editable__"):
                (site / entry.name).symlink_to(entry)
        for name, content in (files or {}).items():
            path = site / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        path = os.pathsep.join([*SOURCES, str(site)])
        command = [sys.executable, "-S", "-c", code.format(device=device)]
        result = subprocess.run(
            command, capture_output=True, text=True, env={"PYTHONPATH": path}, timeout=120, check=False
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr == "", "the check must not print"
        return json.loads(result.stdout)

    return check


def metadata(name: str, version: str) -> dict[str, str]:
    return {f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"}


def test_nothing_is_wrong_here(problems_without):
    assert problems_without() == []


def test_not_installed(problems_without):
    ((kind, what, fix, _),) = problems_without("bitsandbytes")
    assert (kind, what) == ("missing", "bitsandbytes is not installed")
    assert fix == "pip install 'bitsandbytes>=0.48,<0.51'"


def test_everything_is_told_at_once(problems_without):
    problems = problems_without("bitsandbytes", "accelerate", device="cuda:7")
    assert [kind for kind, *_ in problems] == ["missing", "missing", "device"]
    assert problems[1][1] == "accelerate is not installed"


def test_the_wrong_version(problems_without):
    ((kind, what, fix, _),) = problems_without("bitsandbytes", files=metadata("bitsandbytes", "0.31.8"))
    assert kind == "version"
    assert what == "bitsandbytes 0.31.8 is installed, >=0.48,<0.51 was tested"
    assert fix.startswith("pip install")


def test_an_import_that_fails_comes_with_its_traceback(problems_without):
    files = {
        **metadata("bitsandbytes", "0.50.2"),
        "bitsandbytes/__init__.py": "raise OSError('libcudart.so.99: not found')",
    }
    ((kind, what, _, detail),) = problems_without("bitsandbytes", files=files)
    assert kind == "import"
    assert "OSError: libcudart.so.99" in what
    assert "Traceback" in detail


@pytest.mark.parametrize(
    ("device", "words"),
    [("cuda", "device cuda is not there"), ("mps", "does not run on mps"), ("gpu", "'gpu' is no device name")],
)
def test_no_such_device(device, words):
    import torch

    if device == "cuda" and torch.cuda.is_available():
        device, words = "cuda:99", "device cuda:99 is not there"
    problems = polyquant.backend("bitsandbytes").problems(device)
    assert [problem.kind for problem in problems] == ["device"]
    assert words in problems[0].what


def test_no_native_library_for_this_cuda(problems_without):
    """The package without its native libraries, asked as a CUDA machine asks."""
    import bitsandbytes

    package = Path(bitsandbytes.__file__).parent
    version = bitsandbytes.__version__
    files = {
        **metadata("bitsandbytes", version),
        **{f"bitsandbytes/{path.relative_to(package)}": path.read_text() for path in package.rglob("*.py")},
    }
    code = """
import json, logging
logging.disable(logging.CRITICAL)
from polyquant_bitsandbytes._library import native_problems
print(json.dumps([[p.kind, p.what, p.fix, p.detail] for p in native_problems({device!r})]))
"""
    ((kind, what, fix, _),) = problems_without("bitsandbytes", files=files, device="cuda:0", code=code)
    assert kind == "native"
    assert f"bitsandbytes {version} has no native library for CUDA" in what
    assert "pip install --upgrade bitsandbytes" in fix
