"""How pytest-xdist shares the tests out to its processes: `-p grouping`.

A file stays in one process, as its fixtures do; of a conformance suite, what tests one preset: models and checkpoints of
a preset are shared, and no backend's file is the longest of all. (xdist's own --dist=loadgroup marks tests by changing
the name of an item, which pytest 9.2 no longer takes.)

The core's files come first, those with most tests before the others: among them are the long ones. Then plugin after
plugin, in files and presets that are short, so that both processes end together; what a plugin's tests share is made
once in each process.
"""

from __future__ import annotations

from collections import Counter
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


def ordered(nodeids: list[str]) -> list[int]:
    """The places of the tests in `nodeids` in the order in which they are given out, group by group."""
    groups, sizes = list(map(group_of, nodeids)), Counter(map(group_of, nodeids))
    first = {group: place for place, group in reversed(list(enumerate(groups)))}

    def key(place: int) -> tuple[bool, int, int, int]:
        group = groups[place]
        plugin = group.startswith("plugins/")
        return plugin, 0 if plugin else -sizes[group], first[group], place

    return sorted(range(len(nodeids)), key=key)


class ByGroup(LoadScopeScheduling):
    """Sends a group to one process."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [items[place] for place in ordered([item.nodeid for item in items])]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByGroup:
    config.option.loadscopereorder = False  # they come in their order
    return ByGroup(config, log)
