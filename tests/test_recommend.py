"""Tables of candidates and recommendations: what is first and why, and why the others are out."""

import json
import re
from pathlib import Path

import msgspec
import polyquant
import pytest
from polyquant.comparison.records import Job, Result
from polyquant.errors import ConfigError
from polyquant.support.machine import this_machine
from polyquant.memory.predicted import resident_bytes
from polyquant.planning.measured import read_results
from polyquant.planning.scale import standing
from polyquant.measure.quality.records import Quality
from polyquant.measure.speed import Rate, Speed

CONFIG = Path(__file__).parent / "configs" / "qwen2.5-0.5b.json"
GIB = 2**30

pytestmark = pytest.mark.usefixtures("bitsandbytes")


@pytest.fixture(scope="module")
def table():
    return polyquant.plan(CONFIG, memory=budget(), device="cpu", context=512)


def budget():
    """2 GiB, and more where this process holds much already: on a CPU that counts."""
    return max(2 * GIB, resident_bytes() + 3 * GIB // 2)


def test_every_installed_backend_has_its_presets(table):
    shown = {row.candidate.name for row in table.rows}
    for info in polyquant.backends():
        for preset in info.presets:
            assert f"{info.name}:{preset}" in shown
    assert all(row.reason for row in table.rows if row.status != "fits")


def test_what_fits_is_first_and_within_the_budget(table):
    states = [row.status for row in table.rows]
    assert states == sorted(states, key=["fits", "too big", "not planned", "does not run", "left out"].index)
    assert table.fitting
    assert all(row.plan.needed_bytes <= table.memory_bytes for row in table.fitting)
    bits = [row.plan.tensors and max(t.bits for t in row.plan.tensors if t.quantized) for row in table.fitting]
    assert bits[0] == 8
    by_name = {row.candidate.name: row for row in table.rows}
    assert (
        by_name["bitsandbytes:nf4-dq"].plan.weights_planned_bytes
        < by_name["bitsandbytes:nf4"].plan.weights_planned_bytes
    )


def test_what_has_to_be_made_first_says_how(table):
    made = next(row for row in table.rows if row.candidate.name == "gptq:int8")
    assert made.status == "fits", made.reason
    assert made.fix == f"polyquant quantize {CONFIG} --backend gptq --bits 8 --group-size 64 --out DIR"


def test_backends_that_are_not_installed_come_with_their_command(monkeypatch):
    monkeypatch.setenv("POLYQUANT_DISABLE", "bitsandbytes")
    polyquant.registry.installed.registry.cache_clear()
    try:
        table = polyquant.plan(CONFIG, memory="2GiB", device="cpu", context=512)
    finally:
        monkeypatch.undo()
        polyquant.registry.installed.registry.cache_clear()
    assert table.memory_bytes == 2 * GIB
    assert ("bitsandbytes", "pip install polyquant-bitsandbytes") in [(a.backend, a.command) for a in table.absent]


def test_a_broken_plugin_is_a_row(make_plugin):
    make_plugin("import a_library_that_is_missing")
    polyquant.registry.installed.registry.cache_clear()
    try:
        table = polyquant.plan(CONFIG, memory="2GiB", device="cpu", context=512)
        found = polyquant.recommend(CONFIG, memory="2GiB", device="cpu", context=512, comparisons="nowhere")
    finally:
        polyquant.registry.installed.registry.cache_clear()
    row = next(row for row in table.rows if row.candidate.name == "acme")
    assert (row.status, "import failed" in row.reason) == ("does not run", True)
    assert "import failed" in found.excluded["acme"]


RAISING = """
from typing import Literal
from polyquant import hookimpl
from polyquant.options import BackendOptions, convert
from polyquant.types import BackendInfo, Capabilities, DeviceSupport

class Options(BackendOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    bits: Literal[4, 8] = 4

class Plugin:
    @hookimpl
    def backend_info(self):
        return BackendInfo(name="acme", summary="a test", options=Options, docs="https://example.org",
            capabilities=Capabilities(bits=(4, 8), schemes=("int4",), devices=(DeviceSupport(type="cpu"),), on_the_fly=True))
    @hookimpl
    def validate_environment(self, device):
        raise RuntimeError("boom")
    @hookimpl
    def build_config(self, options):
        return convert(Options, options)
    @hookimpl
    def load(self, request, config): ...
    @hookimpl
    def describe_layers(self, model): ...

backend = Plugin()
"""


def test_a_plugin_that_raises_where_it_should_answer_is_never_recommended(make_plugin):
    make_plugin(RAISING)
    polyquant.registry.installed.registry.cache_clear()
    try:
        found = polyquant.recommend(CONFIG, memory="2GiB", device="cpu", context=512, comparisons="nowhere")
    finally:
        polyquant.registry.installed.registry.cache_clear()
    assert "boom" in found.excluded["acme"]
    assert "acme" not in {choice.candidate.backend for choice in found.choices}


def recommended(**more):
    given = {"memory": budget(), "device": "cpu", "context": 512, "comparisons": "nowhere", **more}
    return polyquant.recommend(CONFIG, **given)


def test_the_first_has_its_reason_and_each_other_one_too():
    found = recommended()
    assert found.reason.startswith(f"{found.best.candidate.name}: of {len(found.choices)} candidates that run on cpu")
    assert "llama.cpp's Llama 2 70B scorechart" in found.best.reason
    assert found.best.command.startswith(("polyquant verify", "polyquant quantize"))
    named = {choice.candidate.name for choice in found.choices} | set(found.excluded)
    assert {f"{info.name}:{preset}" for info in polyquant.backends() for preset in info.presets} <= named
    assert all(found.excluded.values())


def test_nothing_is_recommended_that_doctor_refuses():
    refused = {each.backend for each in polyquant.doctor(device="cpu") if not each.runs}
    for goal in ("quality", "speed", "memory"):
        chosen = {choice.candidate.backend for choice in recommended(goal=goal).choices}
        assert chosen
        assert not refused & chosen


# ranks without anything measured here: by what is declared

UNMEASURED = {"auto-round:rtn-int4": "nearest", "auto-round:int4": "tuned", "compressed-tensors:int4": "nearest",
              "compressed-tensors:int4-gptq": "calibrated", "gptq:int4": "calibrated", "awq:int4": "calibrated",
              "hqq:int4": "fitted", "bitsandbytes:nf4": "nearest", "torchao:int4": "nearest"}  # fmt: skip


def ranked(plans):
    """Names of plans, what should lose least first."""
    return sorted(plans, key=lambda name: standing(plans[name]).order)


def plans_of(table):
    return {row.candidate.name: row.plan for row in table.rows if row.plan is not None}


def test_bits_come_first_then_figures_then_the_lower_one(table):
    plans = plans_of(table)
    names = ranked(plans)
    bits = [min(plans[name].level_bits, 8) for name in names]
    assert bits == sorted(bits, reverse=True)
    for width in set(bits):
        same = [plans[name].measured_kl for name in names if min(plans[name].level_bits, 8) == width]
        known = [kl for kl in same if kl is not None]
        assert same == sorted(known) + [None] * (len(same) - len(known))


def test_every_figure_of_a_card_reaches_the_plan(table):
    plans, seen = plans_of(table), 0
    for info in polyquant.backends():
        for preset, kl in info.measured_kl.items():
            if (plan := plans.get(f"{info.name}:{preset}")) is not None:
                assert plan.measured_kl == kl
                seen += 1
    assert seen > 30


def test_what_was_measured_better_is_ranked_better(table):
    at = ranked(plans_of(table)).index
    assert at("hqq:int4") < at("auto-round:rtn-int4"), (
        "rounding to nearest is not calibrated, whatever its backend does"
    )
    assert at("hqq:int4") < at("compressed-tensors:int4")
    assert at("compressed-tensors:int4-gptq") < at("hqq:int4") < at("compressed-tensors:int4")
    assert at("auto-round:int4") < at("awq:int4") < at("bitsandbytes:nf4") < at("bitsandbytes:fp4")
    assert at("gguf:Q5_0") < at("torchao:int4"), "int4 is four bits, also where each weight takes a byte"
    assert at("gguf:Q4_0") < at("gguf:Q4_1"), "its figure, 0, is of a model that was in this type"


def test_without_figures_the_rounding_and_the_format_decide(table):
    plans = {name: plans_of(table)[name] for name in UNMEASURED}
    assert {name: plan.rounding_method for name, plan in plans.items()} == UNMEASURED
    blind = {name: msgspec.structs.replace(plan, measured_kl=None) for name, plan in plans.items()}
    names = ranked(blind)
    assert names[0] == "auto-round:int4"
    assert set(names[1:4]) == {"gptq:int4", "awq:int4", "compressed-tensors:int4-gptq"}
    assert names[1] == "awq:int4", "its integers have zero points"
    assert names[4:6] == ["hqq:int4", "bitsandbytes:nf4"]
    assert set(names[6:]) == {"auto-round:rtn-int4", "compressed-tensors:int4", "torchao:int4"}


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"level_bits": 5.0}, {"measured_kl": 0.001}),
        ({"measured_kl": 0.1}, {"measured_kl": 0.2, "rounding_method": "tuned"}),
        ({"measured_kl": 0.9}, {"rounding_method": "tuned"}),
        ({"rounding_method": "tuned"}, {"rounding_method": "calibrated"}),
        ({"rounding_method": "calibrated"}, {"rounding_method": "fitted", "number_format": "normal floats"}),
        ({"rounding_method": "fitted"}, {"rounding_method": "nearest", "number_format": "k-quants"}),
        ({"number_format": "normal floats"}, {"number_format": "floats"}),
        ({"number_format": "floats"}, {"number_format": "integers"}),
        ({"number_format": "integers", "level_bits": 8.0}, {"number_format": "floats", "level_bits": 8.0}),
    ],
)  # fmt: skip
def test_what_is_declared_decides(table, better, worse):
    plain = {"level_bits": 4.0, "rounding_method": "nearest", "number_format": "integers", "measured_kl": None}
    plan = next(row.plan for row in table.rows if row.candidate.name == "bitsandbytes:nf4")
    first, second = (standing(msgspec.structs.replace(plan, **{**plain, **facts})) for facts in (better, worse))
    assert first.order < second.order


def test_the_reason_says_where_each_figure_came_from(table):
    plan = next(row.plan for row in table.rows if row.candidate.name == "bitsandbytes:nf4")
    known = msgspec.structs.replace(plan, measured_kl=0.249, number_format="normal floats")
    assert standing(known).words == (
        "4 bits, normal floats rounded to nearest: KL 0.249 nats on SmolLM2-135M-Instruct, measured by polyquant's "
        "authors; llama.cpp's Llama 2 70B scorechart has about 1.8 % perplexity at so many bits"
    )
    unknown = msgspec.structs.replace(plan, measured_kl=None)
    assert "this preset has not been measured" in standing(unknown).words


def test_goals_order_differently():
    bits, memory = recommended(goal="quality").choices, recommended(goal="memory").choices
    needed = [choice.needed_bytes for choice in memory]
    assert needed == sorted(needed)
    assert bits[0].candidate.name != memory[0].candidate.name
    assert "its speed was not measured" in recommended(goal="speed").best.reason


def test_needs_filter_by_abilities():
    found = recommended(needs={"trains", "on_the_fly"})
    for choice in found.choices:
        card = polyquant.backend(choice.candidate.backend).capabilities
        assert card.trains
        assert card.on_the_fly
    without = next(info for info in polyquant.backends(on_the_fly=True) if not info.capabilities.trains)
    assert "it has not: trains" in found.excluded[f"{without.name}:{next(iter(without.presets))}"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"goal": "sped"}, "the goal is one of quality, speed, memory, got 'sped'. Did you mean 'speed'?"),
        ({"needs": {"train"}}, "no ability 'train'; there are .*Did you mean 'trains'?"),
        ({"memory": "two"}, "a size is written as 6GiB"),
    ],
)
def test_what_cannot_be_asked(more, message):
    with pytest.raises(ConfigError, match=re.escape(message) if ".*" not in message else message):
        recommended(**more)


def test_a_wrong_budget_is_said_before_the_model_is_looked_for():
    with pytest.raises(ConfigError, match="a size is written as 6GiB"):
        polyquant.recommend("nowhere", memory="two")


def test_a_budget_that_nothing_fits():
    found = recommended(memory="64MiB")
    assert found.best is None
    assert found.reason == "nothing that runs here fits 64.0 MiB"
    assert found.advice[0].startswith("the nearest is ")
    assert "more than there is" in found.advice[0]
    assert found.advice[-1] == "else fewer bits, a smaller model, or more memory"


def test_a_shorter_context_is_proposed_where_that_would_do():
    config = CONFIG.parent / "llama-2-7b.json"
    weights = polyquant.plan(config, "bitsandbytes", bits=4, double_quant=True, context=1)
    found = polyquant.recommend(
        config, memory=weights.needed_bytes + GIB, device="cpu", context=100_000, needs={"trains", "saves"},
        comparisons="nowhere",
    )  # fmt: skip
    assert found.best is None
    (advice,) = [words for words in found.advice if "--context" in words]
    tokens = int(re.search(r"--context (\d+)", advice).group(1))
    name = re.match(r"the nearest is (\S+):", found.advice[0]).group(1)
    backend, preset = name.split(":")
    options = polyquant.backend(backend).info.presets[preset]
    again = polyquant.plan(config, backend, context=tokens, device="cpu", memory=found.memory_bytes, **options)
    assert again.needed_bytes == pytest.approx(found.memory_bytes, rel=0.05)


def quality(kl):
    zeros = dict.fromkeys(Quality.__struct_fields__, 0.0)
    return Quality(**{**zeros, "preset": "llamacpp-512", "windows": 1, "tokens_scored": 255, "kl_mean": kl})


def speed(tokens):
    rate = Rate(mean=tokens, standard_deviation=0.1, repetitions=(tokens,))
    return Speed(prompt_tokens=512, generated_tokens=128, prompt_tokens_per_second=rate,
                 generated_tokens_per_second=rate, first_token_seconds=0.1)  # fmt: skip


@pytest.fixture
def measured(tmp_path):
    """A folder of comparisons with cells on this machine, written as plain results."""
    cells = tmp_path / "run" / "cells"
    cells.mkdir(parents=True)

    def write(name, backend, options, machine=None, **more):
        job = Job(model=str(CONFIG), backend=backend, options=options)
        result = Result(job=job, status="done", machine=machine or this_machine(), **more)
        (cells / f"{name}.json").write_bytes(msgspec.json.encode(result))

    write("a", "bitsandbytes", {"bits": 4, "quant_type": "nf4"}, quality=quality(0.02), speed=speed(10.0))
    write("b", "bitsandbytes", {"bits": 4, "quant_type": "fp4"}, quality=quality(0.05), speed=speed(30.0))
    elsewhere = msgspec.structs.replace(this_machine(), processor="another")
    write("c", "bitsandbytes", {"bits": 8}, machine=elsewhere, quality=quality(0.0001), speed=speed(99.0))
    (cells / "d.json").write_text("{damaged")
    return tmp_path


def test_results_measured_here_come_before_published_figures(measured):
    assert len(read_results(measured)) == 3
    found = recommended(comparisons=measured, memory="8GiB")  # room for this process, whatever ran in it before
    first, second = found.choices[:2]
    assert (first.candidate.name, first.measured, second.candidate.name) == (
        "bitsandbytes:nf4", True, "bitsandbytes:fp4",
    )  # fmt: skip
    assert first.reason == "measured here: KL 0.0200 nats to the dense model (run)"
    assert "it is closest to the dense model" in found.reason
    assert not next(choice for choice in found.choices if choice.candidate.name == "bitsandbytes:int8").measured
    quick = recommended(comparisons=measured, goal="speed", memory="8GiB")
    assert quick.best.candidate.name == "bitsandbytes:fp4"
    assert quick.best.reason == "measured here: 30.0 generated tokens a second (run)"


# the command line and the picture


def test_the_commands(run_python, tmp_path):
    picture = tmp_path / "plans.svg"
    shown = run_python("plan", str(CONFIG), "--memory", "2GiB", "--device", "cpu", "--out", str(picture))
    assert shown.returncode == 0, shown.stderr
    assert "bitsandbytes:nf4" in shown.stdout
    assert "budget" in shown.stdout
    assert picture.read_text().startswith("<?xml")
    one = run_python("plan", str(CONFIG), "-b", "bitsandbytes", "--bits", "4", "--memory", "3GiB", "--layers")
    assert one.returncode == 0, one.stderr
    assert "bits a weight" in one.stdout
    assert "fits" in one.stdout.splitlines()[-1]
    found = run_python("recommend", str(CONFIG), "--memory", "2GiB", "--device", "cpu", "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["choices"]


def test_commands_that_end_with_one(run_python):
    found = run_python("recommend", str(CONFIG), "--memory", "1MiB", "--device", "cpu")
    assert found.returncode == 1
    assert "the nearest is" in found.stdout
    spilled = run_python("plan", str(CONFIG), "-b", "bitsandbytes", "--devices", "cuda:0=300MiB,cpu=4GiB")
    assert spilled.returncode == 1
    assert "spill to cpu" in spilled.stdout
    wrong = run_python("plan", str(CONFIG), "--memory", "2GiB", "--out", "picture.txt")
    assert wrong.returncode == 2
    assert "a picture is written as .svg, .png, .pdf, .html" in wrong.stderr


@pytest.mark.parametrize("suffix", [".svg", ".html", ".png"])
def test_the_picture(table, tmp_path, suffix):
    from polyquant.planning.picture import draw

    path = tmp_path / f"plans{suffix}"
    draw(table, path)
    content = path.read_bytes()
    if suffix == ".png":
        assert content.startswith(b"\x89PNG")
        return
    assert b"<svg" in content
    assert content.startswith(b"<!doctype html>") == (suffix == ".html")


def test_bars_are_as_long_as_what_is_needed(table):
    from polyquant.planning.bars import bars_of

    plans = {row.candidate.name: row.plan for row in table.rows if row.plan}
    for bar in bars_of(table):
        assert bar.total_bytes >= plans[bar.name].needed_bytes
        assert bar.parts[0] + bar.parts[1] + bar.parts[2] == plans[bar.name].weights_planned_bytes
