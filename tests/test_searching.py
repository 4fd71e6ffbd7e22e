"""The parts of a search: the choice under a budget, units and options, sensitivities, what is kept between runs."""

import copy
import itertools
import random

import polyquant
import pytest
import torch
from polyquant.errors import ConfigError, UnsupportedOperation
from polyquant.models.generation import logits_of
from polyquant.modules import matches
from polyquant.searching.knapsack import Choice, assign
from polyquant.searching.sensitivity import Reference
from polyquant.searching.store import Store
from polyquant.searching.units import as_options, units_of
from polyquant.testing.models import tiny_model
from transformers import AutoModelForCausalLM

WINDOWS = [list(range(5, 45)), list(range(60, 90))]


def best(units, budget):
    """The least sum of KL, by trying all."""
    possible = (chosen for chosen in itertools.product(*units) if sum(each.nbytes for each in chosen) <= budget)
    return min(sum(each.kl for each in chosen) for chosen in possible)


@pytest.mark.parametrize("seed", range(40))
def test_an_assignment_is_at_most_one_step_short_of_the_best(seed):
    draw = random.Random(seed)
    units = [
        [Choice(name, draw.randint(1, 60), draw.random() ** 3) for name in "abcd"[: draw.randint(1, 4)]]
        for _ in range(6)
    ]
    least = sum(min(each.nbytes for each in choices) for choices in units)
    most = sum(max(each.nbytes for each in choices) for choices in units)
    step = max(max(each.kl for each in choices) - min(each.kl for each in choices) for choices in units)
    for budget in (least, (least + most) // 2, draw.randint(least, most), most):
        found = assign(units, budget)
        assert [each in choices for each, choices in zip(found, units, strict=True)] == [True] * 6
        assert sum(each.nbytes for each in found) <= budget
        assert sum(each.kl for each in found) <= best(units, budget) + step
    assert sum(each.kl for each in assign(units, most)) == pytest.approx(best(units, most))
    with pytest.raises(ValueError, match="the smallest choices take 1 bytes more"):
        assign(units, least - 1)


def test_a_smaller_format_that_is_closer_is_taken_over_a_larger_one():
    units = [[Choice("a", 10, 0.5), Choice("b", 12, 0.1), Choice("c", 20, 0.3)]]
    assert [assign(units, budget)[0].format for budget in (10, 11, 12, 100)] == ["a", "a", "b", "b"]


MODULES = ["embed", *(f"layers.{n}.{each}" for n in range(12) for each in
           ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))]  # fmt: skip


def test_layers_that_read_the_same_input_are_one_unit():
    grouped, single = units_of(MODULES, grouped=True), units_of(MODULES, grouped=False)
    assert (len(grouped), len(single)) == (1 + 12 * 4, len(MODULES))
    assert ("layers.3.attn.q_proj", "layers.3.attn.k_proj", "layers.3.attn.v_proj") in [
        each.modules for each in grouped
    ]
    assert [name for unit in single for name in unit.modules] == MODULES


@pytest.mark.parametrize("seed", range(20))
def test_options_say_exactly_what_was_assigned(seed):
    draw = random.Random(seed)
    formats = {name: draw.choice(["Q4", "Q4", "Q4", "Q8"][: 1 + seed % 4]) for name in MODULES}
    options = as_options(formats, MODULES[1:], lambda name: {"type": name})
    said = dict.fromkeys(MODULES[1:], options["type"])
    for pattern, chosen in options["layers"]:
        said |= {name: chosen for name in MODULES if matches(name, pattern)}
    assert said == formats
    if seed % 4 == 0:
        assert options == {"type": "Q4", "layers": (("embed", "Q4"),)}  # whose usual format is not that of `type`


def noisy(model, name: str):
    """The model with noise in a module."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        weight = changed.get_submodule(name).weight
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    return changed


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "mixtral"])
def test_a_part_alone_is_measured_as_the_whole_model_with_it_is(tmp_path, architecture):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture, tmp_path), dtype=torch.float32).eval()
    reference = Reference(model, WINDOWS)
    assert reference._replays
    before = logits_of(model, WINDOWS[0])
    head = () if architecture == "llama-tied" else ("lm_head",)  # a tied one changes with its embedding
    for name in ("model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj", *head):
        changed = noisy(model, name)
        exact = [torch.log_softmax(logits_of(model, window), -1) for window in WINDOWS]
        found = [torch.log_softmax(logits_of(changed, window), -1) for window in WINDOWS]
        kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(exact, found, strict=True)]).mean()
        assert reference.kl(changed, (name,)) == pytest.approx(float(kl), rel=1e-4, abs=1e-7)
        assert kl > 1e-4
        assert torch.equal(logits_of(model, WINDOWS[0]), before)  # it is put back


def test_what_was_measured_is_kept_and_a_damaged_file_is_measured_again(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYQUANT_CACHE", str(tmp_path))
    store = Store(("model", "text"))
    store.keep_kl("Q4_0", "mlp", 0.5)
    assert Store(("model", "text")).kl("Q4_0", "mlp") == 0.5
    assert Store(("model", "another text")).kl("Q4_0", "mlp") is None
    store.path.write_text("{")
    assert Store(("model", "text")).kl("Q4_0", "mlp") is None


def test_a_backend_of_one_format_is_refused(rowwise, tmp_path):
    with pytest.raises(UnsupportedOperation, match="rowwise gives all layers one format"):
        polyquant.search("no/model", "1MiB", "rowwise")


def test_a_budget_that_is_no_size_is_refused():
    with pytest.raises(ConfigError, match="a size is written as 6GiB"):
        polyquant.search("no/model", "much")
