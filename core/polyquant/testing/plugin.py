"""The pytest plugin: the suite's markers, and tiny models as a fixture. Loaded with pytest, so it imports little."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import polyquant
from polyquant.contract import hookspecs

MARKERS = (
    "real: loads the real model", "slow: takes minutes", "gpu: needs an accelerator",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


def pytest_report_header() -> str:
    return f"polyquant {polyquant.__version__}, hook specification {hookspecs.VERSION}"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function: name of an architecture -> folder of its tiny checkpoint, made on first use.

    Names: those of `polyquant.testing.ARCHITECTURES`.
    """
    folder = shared_folder(tmp_path_factory) / "tiny"

    def make(name: str) -> Path:
        from polyquant.testing.models import tiny_model

        return tiny_model(name, folder)

    return make


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for the whole run, all processes of pytest-xdist, so that tiny models are made once."""
    base = Path(tmp_path_factory.getbasetemp())
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "conformance"
    folder.mkdir(exist_ok=True)
    return folder
