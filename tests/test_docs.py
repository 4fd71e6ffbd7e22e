"""What the README and the tutorial show is run, and what they show of the output is there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def comparable(text: str) -> list[str]:
    """Lines with figures and runs of blanks levelled, blank lines left out."""
    lines = (re.sub(r"\s+", " ", re.sub(r"\d[\d.,]*", "N", line)).strip() for line in text.splitlines())
    return [re.sub(r"N [KMGT]iB", "N iB", line) for line in lines if line]


def polyquant(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "polyquant", *shlex.split(command)[1:]]
    env = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300, check=False, env=env)


@pytest.mark.real
def test_the_tutorial_shows_what_happens(tmp_path):
    sessions = blocks(ROOT / "docs" / "tutorial" / "index.md", "console")
    assert len(sessions) == 5
    for session in sessions:
        for part in re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            result = polyquant(command, tmp_path)
            assert result.returncode == (2 if "polyquant: " in shown else 0), f"{command}\n{result.stderr}"
            happened = comparable(result.stdout + result.stderr)
            missing = [line for line in comparable(shown) if line not in happened]
            assert not missing, f"{command}: {missing} not in {happened}"


@pytest.mark.real
def test_the_readmes_ten_lines_run(tmp_path):
    code, plugin = blocks(ROOT / "README.md", "python")
    assert len(code.splitlines()) <= 11
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert "True 1" in result.stdout, "the report must have passed"
    assert (tmp_path / "smollm2-nf4" / "model.safetensors").exists()
    compile(plugin, "README.md", "exec")


@pytest.mark.real
def test_the_readmes_commands_run(tmp_path):
    for line in blocks(ROOT / "README.md", "sh")[1].splitlines():
        result = polyquant(line, tmp_path)
        assert result.returncode == 0, f"{line}\n{result.stderr}"
