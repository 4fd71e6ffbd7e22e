"""Processors with AVX512-BF16, on which bitsandbytes repacks weights and loses their scales: polyquant lets none do so."""

import polyquant
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16

from .conftest import TOKENS


@pytest.mark.skipif(not has_avx512bf16(), reason="this processor has no AVX512-BF16")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_stay_as_they_are_stored(tiny, tmp_path, dtype):
    loaded = polyquant.load(tiny, "bitsandbytes", kernel="library", device="cpu", compute_dtype=dtype)
    before = loaded.logits(TOKENS)
    loaded.model.state_dict()
    assert torch.equal(loaded.logits(TOKENS), before)
    again = polyquant.load(loaded.save(tmp_path / "out"), kernel="library", device="cpu", compute_dtype=dtype)
    assert torch.equal(again.logits(TOKENS), before)
    plan = polyquant.plan(tiny, "bitsandbytes", kernel="library", device="cpu", compute_dtype=dtype)
    assert plan.weights_planned_bytes == sum(layer.stored_bytes for layer in loaded.layers)
