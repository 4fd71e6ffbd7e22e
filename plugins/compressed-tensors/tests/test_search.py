"""`polyquant search` where each assignment is a checkpoint first: in the budget, closer than one format, made again."""

import shlex

import polyquant
import pytest
import torch
from polyquant.cli.build import build
from polyquant.errors import ConfigError
from polyquant.support.cache import cache_folder
from polyquant.testing.models import tiny_model
from typer.testing import CliRunner

from .conftest import load

TOKENS = [5, 6, 7]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYQUANT_CACHE", str(tmp_path / "cache"))


def search(model, memory, **options):
    return polyquant.search(model, memory, "compressed-tensors", windows=1, device="cpu", **options)


def schemes(loaded):
    return {layer.name.removesuffix(".weight"): layer.scheme for layer in loaded.layers if layer.quantized}


def test_it_is_in_the_budget_closer_than_one_format_written_and_made_again(folder, tmp_path):
    model = tiny_model("llama", folder / "dense")
    sizes = {
        name: polyquant.plan(
            model, "compressed-tensors", device="cpu", layers={"lm_head": name}, weights=name, kernel="library"
        )  # fmt: skip
        for name in ("int4", "int8")
    }
    small, large = (plan.weights_planned_bytes for plan in sizes.values())
    found = search(model, (small + large) // 2, formats=("int4", "int8"), out=tmp_path / "out", kernel="library")
    assert {each.format: each.stored_bytes for each in found.uniform} == {"int4": small, "int8": large}
    assert small < found.stored_bytes <= (small + large) // 2
    uniform = {each.format: each.quality.kl_mean for each in found.uniform}
    assert uniform["int8"] < found.quality.kl_mean < uniform["int4"]
    loaded = load(found.checkpoint, kernel="library")
    assert sum(layer.stored_bytes for layer in loaded.layers) == found.stored_bytes
    assigned = {name: part.format for part in found.assigned for name in part.modules}
    assert schemes(loaded) == assigned and "lm_head" in assigned and set(assigned.values()) == {"int4", "int8"}
    words = shlex.split(found.command)
    assert words[:2] == ["polyquant", "quantize"]
    result = CliRunner().invoke(build("compressed-tensors"), [*words[1:-1], str(tmp_path / "made")])
    assert result.exit_code == 0, result.output
    assert torch.equal(load(tmp_path / "made", kernel="library").logits(TOKENS), loaded.logits(TOKENS))
    assert not list(cache_folder().glob("search-*"))


def test_formats_with_groups_of_their_own_and_a_method(folder, tmp_path):
    model = tiny_model("llama", folder / "dense")
    found = search(model, "2MiB", formats=("int4-128", "int8-32"), method="gptq", samples=2, length=16,
                   skip=("lm_head",), kernel="decode")  # fmt: skip
    assert {each.format for each in found.uniform} == {"int4-128", "int8-32"}
    options = found.options
    assert options["weights"] + f"-{options['group_size']}" in ("int4-128", "int8-32")
    made = load(polyquant.quantize(model, "compressed-tensors", tmp_path / "made", device="cpu", **options),
                kernel="decode")  # fmt: skip
    assert sum(layer.stored_bytes for layer in made.layers) == found.stored_bytes
    assert made.config.method == "gptq" and "lm_head" not in schemes(made)


def test_presets_name_what_is_tried_and_formats_are_not_chosen_twice(folder):
    model = tiny_model("llama", folder / "dense")
    with pytest.raises(ConfigError, match="with the smallest of int4, int8, fp8 everywhere"):
        search(model, 1000)
    with pytest.raises(ConfigError, match="a search chooses weights, group_size: say what is tried with formats"):
        search(model, "1MiB", weights="int8", group_size=32)
    with pytest.raises(ConfigError, match="no format 'int5' of compressed-tensors's; there are int4,"):
        search(model, "1MiB", formats=("int5",))
