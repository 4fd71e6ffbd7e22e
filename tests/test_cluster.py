"""Cells on a real Ray cluster of two workers on this machine, one of which is killed while it measures."""

import os
import sys
import threading
import time

import polyquant
import psutil
import pytest
from polyquant.comparison.progress import SilentComparison
from polyquant.errors import ConfigError
from polyquant.testing.models import tiny_model

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402  it needs ray

pytestmark = [pytest.mark.usefixtures("rowwise"), pytest.mark.filterwarnings("ignore")]  # ray's own, of all kinds
QUICK = {"device": "cpu", "windows": 2, "parts": ("quality",)}
CANDIDATES = ["dense:float32", "dense:bfloat16", "rowwise:int8", "rowwise@absent/folder"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model("llama", tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, rowwise):
    """A head that runs nothing, and two nodes of one core each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(entry for entry in sys.path if entry))
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            made.add_node(num_cpus=1)
        made.wait_for_nodes()
        yield made
        made.shutdown()


class Killing(SilentComparison):
    """Kills the first worker that has begun to measure."""

    def __init__(self):
        self.killed, self.measured = [], []

    def begin(self, rows):
        threading.Thread(target=self._kill, daemon=True).start()

    def _kill(self):
        deadline = time.monotonic() + 120
        while not self.killed and time.monotonic() < deadline:
            for cell in psutil.process_iter(["cmdline"]):
                if "polyquant.comparison.cell.run" in (cell.info["cmdline"] or ()):
                    worker = cell.parent()
                    if worker is not None and worker.name().startswith("ray::"):  # another test may measure meanwhile
                        worker.kill()
                        self.killed.append(cell)
                        break
            time.sleep(0.05)

    def finish(self, row):
        self.measured.append(row.candidate.name)


def test_a_cluster_gives_what_this_machine_gives(cluster, model, tmp_path):
    here = polyquant.compare(model, CANDIDATES, out=tmp_path / "here", **QUICK)
    killing = Killing()
    there = polyquant.compare(
        model, CANDIDATES, out=tmp_path / "there", engine="ray", address=cluster.address, progress=killing, **QUICK
    )
    assert killing.killed, "no worker was killed"
    assert not killing.killed[0].is_running(), "the cell outlived its worker"
    assert sorted(killing.measured) == sorted(name for name in CANDIDATES if "absent" not in name)
    assert [row.key for row in there.rows] == [row.key for row in here.rows]
    for one, other in zip(here.rows, there.rows, strict=True):
        assert one.result.status == other.result.status, other.result.reason
        if one.result.quality:
            assert one.result.quality.kl_mean == pytest.approx(other.result.quality.kl_mean, rel=1e-3, abs=1e-9)
            assert one.result.stored_bytes == other.result.stored_bytes


def test_what_no_node_has_is_said(cluster, model, tmp_path):
    row = polyquant.compare(
        model, ["rowwise"], out=tmp_path, engine="ray", address=cluster.address, **{**QUICK, "device": "cuda"}
    ).rows[0]
    assert "no node of the cluster has what it needs: GPU 1" in row.result.reason


def test_no_cluster_is_said(model, tmp_path):
    with pytest.raises(ConfigError, match="no Ray cluster at 127.0.0.1:1"):
        polyquant.compare(model, ["rowwise"], out=tmp_path, engine="ray", address="127.0.0.1:1", **QUICK)
