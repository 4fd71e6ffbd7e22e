"""kernel="packed": quanto's numbers in polyquant's own layout; int2 stays with the library."""

import pytest
import torch
from optimum.quanto import QLinear
from polyquant.plugin.layers import PackedLinear
from polyquant.testing.checkpoints import assert_verified
from polyquant.testing.models import tiny_model
from polyquant.testing.oracles import agree

from .test_quanto import TOKENS, load

NEAR = 1e-6  # of the largest weight: the library rounds a product and a sum, the layout both at once


def quantized(loaded):
    return {name: module for name, module in loaded.model.named_modules() if isinstance(module, QLinear)}


@pytest.mark.parametrize("model", ["llama", "odd", "qwen2"])
@pytest.mark.parametrize("weights", ["int8", "int4", "float8"])
def test_weights_are_the_librarys(tmp_path, weights, model):
    path = tiny_model(model, tmp_path)
    loaded, library = (load(path, weights=weights, kernel=each) for each in ("packed", "library"))
    assert_verified(loaded)
    assert quantized(library)
    for name, module in quantized(library).items():
        expected, found = module.weight.dequantize(), loaded.model.get_submodule(name).dequantize()
        agree("quanto", "optimum-quanto's dequantize", found, expected, allowed=NEAR if weights == "int4" else 0.0)


@pytest.mark.parametrize("weights", ["int8", "int4", "float8"])
def test_in_sixteen_bits_it_is_saved_and_comes_back(tmp_path, weights):
    loaded = load(tiny_model("llama", tmp_path), weights=weights, kernel="packed", compute_dtype="bfloat16")
    assert_verified(loaded)
    again = load(loaded.save(tmp_path / "out"), kernel="packed")
    assert_verified(again)
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))


def test_what_has_no_place_stays(tmp_path):
    weights = "int2"
    path = tiny_model("llama", tmp_path)
    loaded, library = (load(path, weights=weights, kernel=each) for each in ("packed", "library"))
    assert quantized(loaded).keys() == quantized(library).keys()
    assert not any(isinstance(module, PackedLinear) for module in loaded.model.modules())
    assert any("no place in the packed layout" in note for note in loaded.notes)
    assert torch.equal(loaded.logits(TOKENS), library.logits(TOKENS))
