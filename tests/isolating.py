"""A third-party backend that needs an environment of its own, and that environment, for the tests: both are real."""

import json
import os
import subprocess
import sys
import sysconfig
import time
from types import SimpleNamespace

import polyquant
import psutil
import pytest
from polyquant.authoring.new import new_backend
from polyquant.isolated.creating import create
from polyquant.isolated.installer import Index

from .installing import importable, write_metadata

OUTER = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "polyquant-outer"
version = "1.0"
[tool.hatch.build.targets.wheel.force-include]
"outer.pth" = "outer.pth"
"""
ISOLATED = """
    libraries=(Library(distribution="polyquant-outer"),),
    isolated=Isolated(reason="it is a test", requirements=("polyquant-outer==1.0",), variables={"ACME": "1"}),
"""


@pytest.fixture(scope="module")
def isolated_rowwise(tmp_path_factory):
    """The third-party backend, declared to need a library that is not here: a distribution whose only file lets an
    environment see what is installed in this one, so that nothing large is installed again."""
    folder = tmp_path_factory.mktemp("isolated")
    links, source, site = folder / "links", folder / "polyquant-rowwise", folder / "site"
    outer = folder / "outer"
    outer.mkdir()
    paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (outer / "outer.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in paths))
    (outer / "pyproject.toml").write_text(OUTER)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w"]
    subprocess.run([*pip, links, outer], check=True)
    new_backend("rowwise", source)
    plugin = source / "src" / "polyquant_rowwise" / "plugin.py"
    code = plugin.read_text().replace("DeviceSupport, PluginBackend", "DeviceSupport, Isolated, Library, PluginBackend")
    plugin.write_text(code.replace("    options=RowwiseOptions,\n", f"    options=RowwiseOptions,{ISOLATED}"))
    info = write_metadata(site, "polyquant-rowwise", {"rowwise": "polyquant_rowwise.plugin:backend"}, "0.1.0")
    (info / "direct_url.json").write_text(json.dumps({"url": source.as_uri(), "dir_info": {}}))
    with importable("polyquant_rowwise", site, source / "src") as patch:
        patch.setenv("POLYQUANT_CACHE", str(folder / "cache"))
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(links))
        patch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip's way to say that there is to be none
        yield os.pathsep.join((str(site), str(source / "src")))


@pytest.fixture(scope="module")
def environment(isolated_rowwise):
    """Made once for the tests of a file."""
    found, said = polyquant.backend("rowwise").environment, []
    if found.problem():
        assert create(found, Index(), SimpleNamespace(step=said.append))
        assert str(said[-1]) == "trying it"
    assert not create(found, Index(), SimpleNamespace(step=said.append))
    return found


def gone(pid: int) -> bool:
    """Whether a process ends within seconds."""
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False
