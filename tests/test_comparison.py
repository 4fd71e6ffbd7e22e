"""A cell of a comparison, in this process and in one of its own: what it measures, and what becomes of failures."""

import os
import subprocess
from types import SimpleNamespace

import msgspec
import pytest
from polyquant.comparison.candidates import DENSE
from polyquant.comparison.cell.run import run
from polyquant.comparison.records import Job, Result
from polyquant.comparison.cell.reference import dense_reference
from polyquant.models.resolve import resolve_dense
from polyquant.testing import warm
from polyquant.testing.models import tiny_model
from polyquant.support.texts import evaluation_text

pytestmark = pytest.mark.usefixtures("rowwise")
PRESET = "llamacpp-512"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model("llama", tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def stored(model, tmp_path_factory):
    """Folder and key of the reference on two windows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))
        done = []
        progress = SimpleNamespace(step=lambda step: done.append((step.done, step.of)))
        found = dense_reference(resolve_dense(model), evaluation_text(), PRESET, limit=2, progress=progress)
        assert done == [(1, 2), (2, 2)]
        again = dense_reference(resolve_dense(model), evaluation_text(), PRESET, limit=2, progress=progress)
        assert (again, done) == (found, [(1, 2), (2, 2)])  # computed once
        assert dense_reference(resolve_dense(model), evaluation_text(), PRESET, limit=1) != found
        return found


def job(model, stored, /, **more):
    return Job(
        **{"model": model, "backend": "rowwise", "device": "cpu", "options": {"compute_dtype": "float32"},
           "reference": str(stored[0]), "reference_key": stored[1], "parts": ("quality",), **more}
    )  # fmt: skip


def test_the_dense_model_against_its_own_reference_is_zero(model, stored):
    result = run(job(model, stored, backend=DENSE))
    assert (result.status, result.reason) == ("done", "")
    assert abs(result.quality.kl_mean) <= 1e-6
    assert result.quality.top1 == 1.0
    assert result.quality.perplexity_ratio == pytest.approx(1.0, abs=1e-5)
    assert (result.quality.windows, result.quality.tokens_scored) == (2, 510)


def test_a_cell_in_a_process_of_its_own_gives_the_same(model, stored, tmp_path, rowwise):
    asked = job(model, stored, parts=("quality", "speed"))
    (tmp_path / "job.json").write_text(asked.to_json())
    command = [
        warm.interpreter(),
        "-m",
        "polyquant.comparison.cell.run",
        str(tmp_path / "job.json"),
        str(tmp_path / "out.json"),
    ]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": rowwise})
    result = msgspec.json.decode((tmp_path / "out.json").read_bytes(), type=Result)
    assert (result.status, result.reason, result.job) == ("done", "", asked)
    here = run(job(model, stored))
    assert result.quality.kl_mean == pytest.approx(here.quality.kl_mean, rel=1e-3)
    assert 0 < result.quality.kl_mean < 0.1
    assert result.memory.weights_stored_bytes == here.memory.weights_stored_bytes
    assert 8 < result.bits_per_weight < 8.5
    assert all(check.passed for check in result.checks)
    assert result.speed.prompt_tokens_per_second.mean > result.speed.generated_tokens_per_second.mean > 0
    assert {"torch", "transformers", "polyquant"} <= result.machine.versions.keys()
    assert [path.name for path in tmp_path.glob("*.partial")] == []


def test_failures_are_results_with_their_reason(model, stored):
    for more, said in (
        ({"backend": "nonsense"}, "UnknownBackend: no backend 'nonsense'"),
        ({"options": {"bits": 3}}, "ConfigError: bits must be 8, got 3"),
        ({"model": "/no/where"}, "ModelError: /no/where"),
        ({"reference_key": "other"}, "holds no reference with the key other"),
    ):
        result = run(job(model, stored, **more))
        assert result.status == "failed"
        assert said in result.reason
