"""How the tests are shared out to the processes of pytest-xdist."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With --dist=loadgroup a file stays in one process, as its fixtures do; conformance suites are split by preset."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.location[0]))
