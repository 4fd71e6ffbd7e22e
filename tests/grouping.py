"""How pytest-xdist shares the tests out to its processes: `-p grouping`.

A file stays in one process, as its fixtures do; of a conformance suite, what tests one preset: models and checkpoints of
a preset are shared, and no backend's file is the longest of all. (xdist's own --dist=loadgroup marks tests by changing
the name of an item, which pytest 9.2 no longer takes.)
"""

from __future__ import annotations

from typing import Any

import pytest
from polyquant.testing.check import REAL
from polyquant.testing.models import ARCHITECTURES
from xdist.scheduler import LoadScopeScheduling

MODELS = sorted((REAL, *ARCHITECTURES), key=len, reverse=True)
"""What a case of the suite ends with, after its preset; the longest first."""


def group_of(nodeid: str) -> str:
    """The tests that stay together with this one."""
    file, _, name = nodeid.partition("::")
    if not file.endswith("test_conformance.py"):
        return file
    case = name.partition("[")[2].rstrip("]")
    model = next((model for model in MODELS if case.endswith(f"-{model}")), "")
    return f"{file}[{case.removesuffix(f'-{model}')}]"


class ByGroup(LoadScopeScheduling):
    """Sends a group to one process, the larger groups first."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByGroup:
    return ByGroup(config, log)
