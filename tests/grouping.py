"""How the tests are shared out to the processes of pytest-xdist with --dist=loadgroup: `-p grouping`."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file stays in one process, as its fixtures do, but for the tests of a conformance suite that ask for a preset."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.location[0]))
