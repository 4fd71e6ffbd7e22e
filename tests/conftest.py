"""Real plugin distributions and processes for the tests: nothing is mocked, metadata lies on disk as pip writes it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import polyquant
import pytest
from hypothesis import settings
from polyquant.authoring.new import new_backend

settings.register_profile("fuzz", max_examples=2000)

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
def make_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write an importable module with a distribution's metadata beside it, and put both on sys.path."""

    def make(
        code: str = GOOD_PLUGIN, *, backend: str = "acme", distribution: str = "polyquant-acme", version: str = "1.0"
    ) -> str:
        site = tmp_path / "site" / distribution
        module = distribution.replace("-", "_")
        site.mkdir(parents=True)
        (site / f"{module}.py").write_text(textwrap.dedent(code))
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[polyquant.backends]\n{backend} = {module}:backend\n")
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, module, raising=False)
        return module

    return make


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run code, or `python -m polyquant` with arguments, in a process of its own."""

    def run(*arguments: str, code: str | None = None, **more: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code] if code is not None else [sys.executable, "-m", "polyquant", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **more)  # type: ignore[call-overload,no-any-return]

    return run


@pytest.fixture(scope="session")
def rowwise_package(tmp_path_factory) -> Path:
    """The package that `polyquant new-backend rowwise` writes."""
    out = tmp_path_factory.mktemp("authoring") / "polyquant-rowwise"
    new_backend("rowwise", out)
    return out


@pytest.fixture(scope="module")
def rowwise(rowwise_package, tmp_path_factory):
    """The third-party backend `rowwise`, installed as far as importlib can tell; gives the import path that does it."""
    source = rowwise_package / "src"
    site = tmp_path_factory.mktemp("site")
    info = site / "polyquant_rowwise-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: polyquant-rowwise\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[polyquant.backends]\nrowwise = polyquant_rowwise.plugin:backend\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(source))
        patch.syspath_prepend(str(site))
        for name in [name for name in sys.modules if name.partition(".")[0] == "polyquant_rowwise"]:
            patch.delitem(sys.modules, name)  # that of another test, from another folder
        polyquant.api.registry.cache_clear()
        yield os.pathsep.join((str(site), str(source)))
    polyquant.api.registry.cache_clear()
