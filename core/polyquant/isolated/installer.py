"""The commands that fill an environment: with `uv` where it is installed, else with venv and pip."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from polyquant.isolated.environments import Environment
from polyquant.isolated.installing import Command
from polyquant.support.libraries import installed_version
from polyquant.types import Record

PASSED_ON = ("index-url", "extra-index-url", "find-links", "constraint")
"""pip's options of which uv is told; pip itself reads its PIP_* variables and its configuration."""


class Index(Record, frozen=True):
    """Where packages come from, beside what pip's own variables and configuration say."""

    constraint: tuple[str, ...] = ()  # files
    index_url: tuple[str, ...] = ()
    extra_index_url: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()
    no_index: bool = False

    def arguments(self) -> list[str]:
        """As pip and uv take them."""
        named = {name: getattr(self, name.replace("-", "_")) for name in PASSED_ON}
        words = [word for name, values in named.items() for value in values for word in (f"--{name}", value)]
        return words + (["--no-index"] if self.no_index else [])


def commands(environment: Environment, index: Index, *, uv: str | None = None) -> list[Command]:
    """What makes `environment` where nothing is: the requirements, those without dependencies, the core and the plugin.

    uv: its path; None: as found. The pins hold for everything that the core asks for too.
    """
    uv = shutil.which("uv") if uv is None else uv
    made, python = str(environment.folder), str(environment.python)
    make: tuple[str, ...]
    if uv:
        make = (uv, "venv", "--seed", "--python", sys.executable, made)
        # as pip does it: the best version of all indexes
        install = [uv, "pip", "install", "--python", python, "--index-strategy", "unsafe-best-match"]
        install += from_variables(os.environ)
    else:
        # newer than the one that venv would bring; `find_spec` would make setuptools leave distutils alone from then on
        ours = installed_version("pip") is not None
        make = (sys.executable, "-m", "venv", *(["--without-pip"] if ours else []), made)
        pip = [sys.executable, "-m", "pip", "--python", python] if ours else [python, "-m", "pip"]
        install = [*pip, "install", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    install += index.arguments()
    isolated = environment.isolated
    made_by = [Command(what="making the environment", words=make)]
    if isolated.requirements:
        made_by.append(Command(what="installing its requirements", words=(*install, *isolated.requirements)))
    if alone := isolated.without_dependencies:
        made_by.append(Command(what="installing what comes alone", words=(*install, "--no-deps", *alone)))
    core_and_plugin = [word for words in environment.installs for word in words]
    pinned = ["--constraint", str(environment.folder.with_suffix(".pins"))] if pins(environment) else []
    made_by.append(Command(what="installing polyquant", words=(*install, *pinned, *core_and_plugin)))
    return made_by


def pins(environment: Environment) -> list[str]:
    """The requirements that name a version, as lines of a constraint file."""
    return [each for each in environment.isolated.requirements if "==" in each and "@" not in each]


def from_variables(variables: Mapping[str, str]) -> list[str]:
    """pip's PIP_* variables about indexes as uv's arguments; uv does not read them."""
    words: list[str] = []
    for name in PASSED_ON:
        values = variables.get(f"PIP_{name.upper().replace('-', '_')}", "").split()
        words += [word for value in values for word in (f"--{name}", value)]
    return words + (["--no-index"] if _is_true(variables.get("PIP_NO_INDEX", "")) else [])


def _is_true(value: str) -> bool:
    return value.lower() in ("1", "true", "yes", "on")


def write_pins(environment: Environment) -> Path:
    """The constraint file that keeps the core's dependencies at the pins."""
    path = environment.folder.with_suffix(".pins")
    path.write_text("\n".join(pins(environment)) + "\n")
    return path
