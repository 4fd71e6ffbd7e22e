"""A load is settled in one place, and the answer does not depend on what lies in a cache."""

import json
import os

import polyquant
import pytest
from polyquant.errors import CheckpointConflict, ConfigError
from polyquant.loading.settle import route_of
from polyquant.models.resolve import resolve, resolve_dense
from polyquant.testing import tiny_model

MODEL = "builtin:smollm2"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("models"))


@pytest.mark.real
def test_plans_are_the_same_with_an_empty_and_with_a_filled_cache(run_python, tmp_path):
    """In processes of their own: what a process has imported decides what it weighs."""
    code = """
import json
import polyquant
names = ("bitsandbytes", "gguf", "gptq", "llama-cpp", "compressed-tensors")
plans = polyquant.plan("builtin:smollm2", memory="64GiB", device="cpu")
rows = [row for row in plans.rows if row.candidate.backend in names]
print(json.dumps([[row.candidate.name, row.status, row.reason, row.fix, row.plan and [
    row.plan.route, row.plan.options, row.plan.weights_planned_bytes, row.plan.checkpoint_bytes, list(row.plan.notes),
    row.plan.load_peak_bytes - row.plan.process_bytes, [tensor.dtype for tensor in row.plan.tensors]]]
    for row in sorted(rows, key=lambda row: row.candidate.name)], default=list))
"""
    empty = {**os.environ, "POLYQUANT_CACHE": str(tmp_path / "empty")}
    resolve_dense(MODEL)  # fills this session's cache
    first, second = (run_python(code=code, env=env) for env in (empty, dict(os.environ)))
    assert first.returncode == 0, first.stderr
    rows, again = json.loads(first.stdout), json.loads(second.stdout)
    assert rows == again
    assert not list((tmp_path / "empty").rglob("*.safetensors")), "a plan reads headers and makes nothing"
    routes = {name.partition(":")[0]: plan[0] for name, _, _, _, plan in rows if plan}
    assert routes["gguf"] == "dense first"
    assert routes["llama-cpp"] == "as stored"
    assert {name: routes[name] for name in ("gptq", "bitsandbytes") if name in routes} == {
        name: route for name, route in (("gptq", "make first"), ("bitsandbytes", "dense first")) if name in routes
    }


@pytest.mark.parametrize(
    ("backend", "model", "route"),
    [
        ("bitsandbytes", MODEL, "dense first"),
        ("gguf", MODEL, "dense first"),
        ("llama-cpp", MODEL, "as stored"),
        ("gptq", MODEL, "make first"),
        ("bitsandbytes", "tiny", "on the fly"),
        ("gptq", "tiny", "make first"),
        ("llama-cpp", "tiny", "make first"),
    ],
)
def test_the_route_of_a_load(backend, model, route, tiny):
    if backend not in polyquant.registry.installed.registry().names():
        pytest.skip(f"{backend} is not installed")
    source = resolve(tiny if model == "tiny" else model)
    assert route_of(source, polyquant.backend(backend)) == route
    assert polyquant.backend(backend).can("quantize") or route != "make first" or backend == "llama-cpp"


def test_who_can_only_read_refuses_a_dense_model(tiny):
    with pytest.raises(
        CheckpointConflict, match="is dense, and bitnet loads quantized checkpoints only .*makes none of a dense model"
    ):
        route_of(resolve(tiny), polyquant.backend("bitnet"))


def test_the_record_of_a_load_is_what_the_plan_said(tiny):
    loaded = polyquant.load(tiny, "bitsandbytes", device="cpu", bits=4, skip=("lm_head",))
    plan = polyquant.plan(tiny, "bitsandbytes", device="cpu", bits=4, skip=("lm_head",))
    settled = loaded.settled
    assert (settled.route, settled.dtype, settled.device) == (plan.route, plan.compute_dtype, plan.device)
    assert settled.options == loaded.config
    assert [tensor.name for tensor in plan.tensors] == [weight.name for weight in settled.weights]
    assert loaded.request.weights == settled.weights


def test_options_come_as_a_record_too(tiny):
    options = polyquant.backend("bitsandbytes").info.options
    loaded = polyquant.load(tiny, config=options(bits=4, quant_type="fp4"), device="cpu")
    assert loaded.backend.name == "bitsandbytes"
    assert loaded.config.quant_type == "fp4"
    with pytest.raises(ConfigError, match="in config, or as keywords, not both: bits"):
        polyquant.load(tiny, config=options(), bits=4)
    with pytest.raises(ConfigError, match="gguf takes GgufOptions, and config is BitsAndBytesOptions"):
        polyquant.load(tiny, "gguf", config=options())


def test_a_load_leaves_the_c_librarys_memory_settings_alone(tiny, monkeypatch):
    """A load, a verification and a save change no malloc setting; asked for, a load may."""
    calls = []
    monkeypatch.setattr("polyquant.support.malloc._glibc", lambda name: lambda *given: calls.append((name, *given)))
    loaded = polyquant.load(tiny, "bitsandbytes", device="cpu", bits=4)
    polyquant.verify(loaded)
    assert not [call for call in calls if call[0] == "mallopt"]
    polyquant.load(tiny, "bitsandbytes", device="cpu", bits=4, return_freed_memory=True)
    assert calls, "asked for, freed memory goes back"
