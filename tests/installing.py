"""Backends that are installed for some tests, as far as importlib and importlib.metadata can tell."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import polyquant
import polyquant.registry.installed
import pytest


def write_metadata(site: Path, distribution: str, points: Mapping[str, str], version: str = "1.0") -> Path:
    """What pip leaves of a distribution with these entry points in a site folder: the path of its .dist-info."""
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    lines = [f"{backend} = {value}\n" for backend, value in points.items()]
    (info / "entry_points.txt").write_text("[polyquant.backends]\n" + "".join(lines))
    return info


@contextmanager
def importable(package: str, *folders: Path) -> Iterator[pytest.MonkeyPatch]:
    """What is in these folders is found first, and nothing that other tests import as this package, or they as ours."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in reversed(folders):
            patch.syspath_prepend(str(folder))
        others = take_out(package)
        try:
            yield patch
        finally:
            take_out(package)
            sys.modules.update(others)
    polyquant.registry.installed.registry.cache_clear()


def take_out(package: str) -> dict[str, ModuleType]:
    """Its modules; whoever imports it next gets new ones."""
    polyquant.registry.installed.registry.cache_clear()
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == package}
