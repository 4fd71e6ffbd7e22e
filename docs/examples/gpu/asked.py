"""What the repository asks for, and what the machine that the kit is for has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent.parent.parent


@dataclass
class Target:
    """The machine that the kit is for."""

    python: str  # 3.12
    there: dict[str, str]  # distribution -> version; empty: it is there in a version not known
    interpreter: Path | None  # a Python of that version on this machine, to build with

    @property
    def environment(self) -> dict[str, str]:
        """For the markers of requirements."""
        return {
            "python_version": self.python, "python_full_version": f"{self.python}.0", "sys_platform": "linux",
            "platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix", "extra": "",
            "implementation_name": "cpython", "platform_python_implementation": "CPython",
        }  # fmt: skip


def read_there(path: Path) -> dict[str, str]:
    """distribution -> version, of the lines of `pip freeze`; a name alone has an empty one."""
    there = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if text:
            name, _, version = text.partition("==")
            there[canonicalize_name(name.strip())] = version.partition("+")[0].strip()
    return there


def read_pins() -> dict[str, str]:
    """The versions that the repository's tests run with."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def read_plugins() -> dict[Path, dict[str, Any]]:
    """Each plugin's folder with its [tool.polyquant.development], which noxfile.py explains."""
    folders = [path.parent for path in sorted((ROOT / "plugins").glob("*/pyproject.toml"))]
    return {path: read_toml(path).get("tool", {}).get("polyquant", {}).get("development", {}) for path in folders}


def read_toml(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def interpreter_of(version: str) -> Path | None:
    """A Python of that version on this machine; None where there is none."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return Path(sys.executable)
    command = shutil.which(f"python{version}")
    if command is None:
        return None
    asked = [command, "-c", "import sys; print(sys.executable)"]  # a shim of pyenv answers once it is told which
    ended = subprocess.run(
        asked, capture_output=True, text=True, check=False, env={**os.environ, "PYENV_VERSION": version}
    )
    return Path(ended.stdout.strip()) if ended.returncode == 0 else None


def applying(requirements: list[Requirement], target: Target) -> Iterator[Requirement]:
    """Those whose marker holds on the target."""
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate(target.environment):
            yield requirement
