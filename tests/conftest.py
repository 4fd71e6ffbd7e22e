"""Real plugin distributions and processes for the tests: nothing is mocked, metadata lies on disk as pip writes it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import polyquant
import pytest
from hypothesis import settings
from polyquant.authoring.new import new_backend
from polyquant.testing import warm

from .installing import importable, write_metadata
from .isolating import environment, isolated_rowwise

__all__ = ["environment", "isolated_rowwise"]  # fixtures

settings.register_profile("fuzz", max_examples=4000)  # eight kinds of headers and configs: 32,000

GOOD_PLUGIN = """
from typing import Literal
from polyquant import hookimpl
from polyquant.loaded import LoadedModel
from polyquant.options import BackendOptions, convert
from polyquant.types import BackendInfo, Capabilities, DeviceSupport

class Options(BackendOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    bits: Literal[4, 8] = 4

class Plugin:
    @hookimpl
    def backend_info(self):
        return BackendInfo(name="acme", summary="a test", options=Options, docs="https://example.org",
            capabilities=Capabilities(bits=(4, 8), schemes=("int4",), devices=(DeviceSupport(type="cpu"),)))
    @hookimpl
    def validate_environment(self, device):
        return []
    @hookimpl
    def build_config(self, options):
        return convert(Options, options)
    @hookimpl
    def load(self, request, config):
        return LoadedModel(model=None, tokenizer=None, config=config, kernel="none")
    @hookimpl
    def describe_layers(self, model):
        return []

backend = Plugin()
"""


@pytest.fixture(scope="session")
def bitsandbytes() -> None:
    """Skips where bitsandbytes does not run: it takes fewer versions of transformers than the core does."""
    if problems := polyquant.backend("bitsandbytes").problems("cpu"):
        pytest.skip(problems[0].what)


@pytest.fixture
def make_plugin(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Write a module with a distribution's metadata beside it; both can be imported until the test ends."""
    until_it_ends = ExitStack()

    def make(
        code: str = GOOD_PLUGIN, *, backend: str = "acme", distribution: str = "polyquant-acme", version: str = "1.0"
    ) -> str:
        site = tmp_path / "site" / distribution
        module = distribution.replace("-", "_")
        site.mkdir(parents=True)
        (site / f"{module}.py").write_text(textwrap.dedent(code))
        write_metadata(site, distribution, {backend: f"{module}:backend"}, version)
        until_it_ends.enter_context(importable(module, site))
        return module

    with until_it_ends:
        yield make


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run code, or `python -m polyquant` with arguments, in a process of its own.

    It may have imported torch and transformers; `fresh`: it has not.
    """

    def run(
        *arguments: str, code: str | None = None, env: dict[str, str] | None = None, cwd: Path | None = None,
        fresh: bool = False,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        command = ["-m", "polyquant", *arguments] if code is None else ["-c", code]
        if fresh:
            command = [sys.executable, *command]
            return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env, cwd=cwd)
        return warm.run(command, seconds=300, environment=env, folder=cwd)

    return run


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """An empty cache for the tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def warm_children():
    """What this process starts as sys.executable has torch and transformers imported."""
    with warm.as_executable():
        yield


@pytest.fixture(scope="session")
def rowwise_package(tmp_path_factory) -> Path:
    """The package that `polyquant new-backend rowwise` writes."""
    out = tmp_path_factory.mktemp("authoring") / "polyquant-rowwise"
    new_backend("rowwise", out)
    return out


@pytest.fixture(scope="module")
def rowwise(rowwise_package, tmp_path_factory):
    """The third-party backend `rowwise`, installed as far as importlib can tell; gives the import path that does it."""
    source, site = rowwise_package / "src", tmp_path_factory.mktemp("site")
    write_metadata(site, "polyquant-rowwise", {"rowwise": "polyquant_rowwise.plugin:backend"})
    with importable("polyquant_rowwise", site, source):
        yield os.pathsep.join((str(site), str(source)))
