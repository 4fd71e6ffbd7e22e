"""A comparison held to limits and to an earlier one: on figures that were really measured (tests/data)."""

import json
import math
import shutil
from pathlib import Path

import msgspec
import polyquant
import pytest
from msgspec.structs import replace
from polyquant.comparison.gate import LIMITED, Limits
from polyquant.comparison.records import OTHER_WORK
from polyquant.comparison.report.columns import KEYS
from polyquant.comparison.result import Comparison
from polyquant.errors import ConfigError

DATA = Path(__file__).parent / "data" / "comparison.json"
NF4 = "bitsandbytes:nf4"


@pytest.fixture(scope="module")
def comparison():
    return polyquant.read_comparison(DATA)


def changed(comparison, name, **fields):
    """The comparison with other fields in the result of one row."""
    rows = tuple(
        replace(row, result=replace(row.result, **fields)) if row.candidate.name == name else row
        for row in comparison.rows
    )
    return replace(comparison, rows=rows)


def result(comparison, name):
    return next(row.result for row in comparison.rows if row.candidate.name == name)


def verdict(comparison, figure="kl_mean", /, name=NF4, **limits):
    (found,) = [each for each in comparison.gate(candidates=name, **limits).judgements if each.figure == figure]
    return found.verdict


def test_a_figure_fails_only_where_its_whole_interval_is_beyond_the_limit(comparison):
    quality = result(comparison, NF4).quality
    around = 3 * quality.kl_standard_error
    for limit, loose, strict in (
        (quality.kl_mean - 1.01 * around, "failed", "failed"),
        (quality.kl_mean - 0.99 * around, "within error", "failed"),
        (quality.kl_mean + 0.99 * around, "within error", "failed"),
        (quality.kl_mean + 1.01 * around, "passed", "passed"),
    ):
        assert verdict(comparison, max_kl=limit) == loose
        assert verdict(comparison, max_kl=limit, strict=True) == strict
    top1 = 3 * quality.top1_standard_error
    assert verdict(comparison, "top1", min_top1=quality.top1 - 1.01 * top1) == "passed"
    assert verdict(comparison, "top1", min_top1=quality.top1 + 1.01 * top1) == "failed"


def test_bytes_are_exact_and_a_speed_is_known_to_five_per_cent(comparison):
    stored = result(comparison, NF4).memory.weights_stored_bytes
    assert verdict(comparison, "weights_stored_bytes", max_bytes=stored) == "passed"
    assert verdict(comparison, "weights_stored_bytes", max_bytes=stored - 1) == "failed"
    assert verdict(comparison, "weights_stored_bytes", max_bytes="6GiB", strict=True) == "passed"
    speed = result(comparison, NF4).speed.generated_tokens_per_second
    assert 2 * speed.standard_deviation < 0.05 * speed.mean
    key = "generated_tokens_per_second"
    assert verdict(comparison, key, min_tokens_per_second=1.04 * speed.mean) == "within error"
    assert verdict(comparison, key, min_tokens_per_second=1.06 * speed.mean) == "failed"
    beside = changed(comparison, NF4, other_work_share=2 * OTHER_WORK)
    assert verdict(beside, key, min_tokens_per_second=1.06 * speed.mean) == "within error"
    assert verdict(beside, key, min_tokens_per_second=1.06 * speed.mean, strict=True) == "failed"
    assert verdict(beside, key, min_tokens_per_second=0.9 * speed.mean) == "passed"


def test_the_perplexity_ratio_has_an_interval_where_one_was_stored(comparison):
    quality = result(comparison, NF4).quality
    ratio = quality.perplexity_ratio
    (found,) = comparison.gate(candidates=[NF4], max_perplexity_ratio=ratio - 0.001).judgements[1:]
    assert (found.verdict, found.margin, found.reason) == ("failed", 0.0, "no error was stored with it")
    known = changed(comparison, NF4, quality=replace(quality, perplexity_ratio_standard_error=0.01))
    assert verdict(known, "perplexity_ratio", max_perplexity_ratio=ratio - 0.001) == "within error"
    assert verdict(known, "perplexity_ratio", max_perplexity_ratio=ratio - 0.031) == "failed"


def test_what_has_no_figure_fails_by_name(comparison):
    found = comparison.gate(max_kl=10, min_tokens_per_second=0.1)
    assert {(each.candidate, each.figure) for each in found.failures} == {
        ("quark:int8", "status"), ("hqq:int9", "status"), ("awq:int4", "status"),
    }  # fmt: skip
    assert not found.passed
    assert "dense:float32" not in {each.candidate for each in found.judgements}  # the reference
    unmeasured = changed(comparison, NF4, speed=None).gate(max_kl=10, min_tokens_per_second=0.1)
    (lost,) = [each for each in unmeasured.failures if each.candidate == NF4]
    assert (lost.figure, lost.reason) == ("generated_tokens_per_second", "not measured")
    (row,) = [row for row in comparison.rows if row.candidate.name == NF4]
    emulated = replace(row, candidate=replace(row.candidate, options={"emulate_activations": True}))
    alone = replace(comparison, rows=(emulated,)).gate(min_tokens_per_second=0.1)
    assert ["of the emulation" in each.reason for each in alone.failures] == [True]


def test_what_is_worse_than_before_beyond_noise_fails(comparison):
    same = comparison.gate(against=comparison, candidates=[NF4, "hqq:int4"])
    assert same.passed and len(same.judgements) > 10
    quality = result(comparison, NF4).quality
    noise = 3 * math.sqrt(2) * quality.kl_standard_error

    def with_kl(more):
        return changed(comparison, NF4, quality=replace(quality, kl_mean=quality.kl_mean + more))

    assert with_kl(0.99 * noise).gate(against=comparison, candidates=NF4).passed
    assert with_kl(-1.01 * noise).gate(against=comparison, candidates=NF4).passed
    worse = with_kl(1.01 * noise)
    (failure,) = worse.gate(against=comparison, candidates=NF4).failures
    assert (failure.candidate, failure.figure, failure.limit) == (NF4, "kl_mean", quality.kl_mean)
    assert worse.gate(against=comparison, candidates="hqq:int4").passed
    lost = changed(comparison, NF4, quality=None).gate(against=comparison, candidates=NF4)
    assert {each.figure for each in lost.failures} == {"kl_mean", "top1", "perplexity_ratio"}
    gone = replace(comparison, rows=comparison.rows[1:3])
    fewer = gone.gate(against=replace(comparison, rows=comparison.rows[1:4]))
    assert [(each.candidate, each.reason) for each in fewer.failures] == [("hqq:int4", "no longer there")]


def test_speeds_are_not_held_to_those_of_another_machine(comparison):
    (row,) = [row for row in comparison.rows if row.candidate.name == NF4]
    before = replace(comparison, rows=(row,))
    rate = row.result.speed.generated_tokens_per_second
    slow = replace(row.result.speed, generated_tokens_per_second=replace(rate, mean=rate.mean / 2))
    after = changed(before, NF4, speed=slow)
    assert [each.figure for each in after.gate(against=before).failures] == ["generated_tokens_per_second"]
    elsewhere = changed(after, NF4, machine=replace(row.result.machine, processor="another"))
    found = elsewhere.gate(against=before)
    assert found.passed and "speeds are not held to those of another machine" in found.notes


def test_what_cannot_be_judged_is_refused(comparison):
    for more, said in (
        ({}, "no limit is given"),
        ({"strict": True}, "no limit is given"),
        ({"max_kl": 1, "candidates": "hqq:in4"}, "has no candidate 'hqq:in4'.*Did you mean 'hqq:int4'"),
        ({"max_kl": -1}, "max_kl is a number from 0, got -1"),
        ({"max_kl": math.nan}, "max_kl is a number from 0, got nan"),
        ({"min_top1": 70}, "min_top1 is a number from 0 to 1, got 70"),
        ({"max_bytes": "6 gigs"}, "a size is written as 6GiB"),
        ({"against": "nowhere"}, "nowhere holds no comparison"),
    ):
        with pytest.raises(ConfigError, match=said):
            comparison.gate(**more)
    with pytest.raises(ConfigError, match="nothing but the reference"):
        replace(comparison, rows=comparison.rows[:1]).gate(max_kl=1)
    with pytest.raises(ConfigError, match=r"generated tokens/s: measured for none of bitsandbytes:nf4 .*parts="):
        changed(comparison, NF4, speed=None).gate(candidates=NF4, min_tokens_per_second=1)
    other = replace(comparison, setting=replace(comparison.setting, text="another"))
    with pytest.raises(ConfigError, match=r"cannot be held against each other: they differ in text \(.*another now"):
        other.gate(against=comparison)


def test_every_limit_holds_a_column_and_has_its_keyword():
    given = {"strict", *LIMITED}
    assert set(Limits.__struct_fields__) == given
    assert set(LIMITED.values()) <= set(KEYS)
    assert given <= set(Comparison.gate.__annotations__)


def test_a_gate_is_shown_failures_first(comparison):
    found = comparison.gate(max_kl=0.2, max_bytes="180MB", candidates=[NF4, "hqq:int4", "quark:int8"])
    text = repr(found)
    assert text.splitlines()[0] == "failed: 3 of 9 figures, 1 within error of the limit"
    assert [line.split("  ")[1] for line in text.splitlines()[2:7]] == ["failed"] * 3 + ["within error", "passed"]
    assert "0.2487 ± 0.02329" in text and "210.1 MiB" in text and "61.2%" in text
    assert msgspec.json.decode(found.to_json(), type=type(found)) == found


def test_the_command_ends_with_a_code_for_ci(run_python, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(DATA, run / "comparison.json")
    passed = run_python("gate", str(run), "-c", NF4, "--max-kl", "0.3", "--max-bytes", "6GiB")
    assert (passed.returncode, passed.stderr) == (0, "")
    assert "passed: 3 figures" in passed.stdout
    failed = run_python("gate", str(run / "comparison.json"), "-c", NF4, "--max-kl", "0.05", "--json")
    assert failed.returncode == 1
    plain = json.loads(failed.stdout)
    assert plain["passed"] is False
    assert [each["figure"] for each in plain["judgements"] if each["verdict"] == "failed"] == ["kl_mean"]
    (run / "comparison.json").write_text("{")
    for words, said in (
        (("gate", str(tmp_path), "--max-kl", "1"), "holds no comparison"),
        (("gate", str(run), "--max-kl", "1"), "is damaged"),
        (("gate", str(DATA)), "such as --max-kl 0.05 or --max-bytes 6GiB"),
        (("gate", str(DATA), "--max-kl", "much"), "max_kl must be number, got 'much'"),
        (("gate", str(DATA), "--max-kI", "1"), "No such option"),
    ):
        refused = run_python(*words)
        assert refused.returncode == 2, words
        assert said in refused.stderr


def test_a_difference_is_public_and_shown(comparison, tmp_path):
    quality = result(comparison, NF4).quality
    after = changed(comparison, NF4, quality=replace(quality, kl_mean=2 * quality.kl_mean))
    (tmp_path / "comparison.json").write_text(after.to_json())
    found = polyquant.difference(DATA, tmp_path)
    assert found == polyquant.difference(polyquant.read_comparison(DATA.parent), polyquant.read_comparison(tmp_path))
    assert [change.figure for change in found.worsened] == ["kl_mean"]
    assert repr(found).splitlines()[0] == "1 of 60 figures of 10 candidates changed beyond noise, 1 for the worse."
    assert NF4 in repr(found) and NF4 in found._repr_html_()
    assert NF4 in found.report(tmp_path / "difference.html").read_text()
    assert "turns" in json.loads(found.to_json())
