"""Processors with AVX512-BF16, on which bitsandbytes repacks weights: with bfloat16 alone, and never silently wrong."""

import bitsandbytes
import polyquant
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from polyquant.errors import SaveError

from .conftest import NF4, TOKENS, load

pytestmark = pytest.mark.skipif(not has_avx512bf16(), reason="this processor has no AVX512-BF16")


def linears(loaded):
    return [module for module in loaded.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


def test_float32_stays_float32(tiny):
    loaded = load(tiny, **NF4)
    loaded.logits(TOKENS)
    assert not any("repacks" in note for note in loaded.notes)
    assert not any(getattr(module.weight.quant_state, "packing_format_for_cpu", False) for module in linears(loaded))
    before = loaded.logits(TOKENS)
    loaded.model.state_dict()
    assert torch.equal(loaded.logits(TOKENS), before)


def test_bfloat16_is_repacked_saved_exactly_and_gives_no_state(tiny, tmp_path):
    loaded = polyquant.load(tiny, "bitsandbytes", kernel="library", device="cpu", compute_dtype="bfloat16")
    before = loaded.logits(TOKENS)
    assert any("repacks" in note for note in loaded.notes)
    with pytest.raises(SaveError, match="state_dict.. would leave the model with wrong ones"):
        loaded.model.state_dict()
    assert torch.equal(loaded.logits(TOKENS), before)
    again = polyquant.load(loaded.save(tmp_path / "out"), kernel="library", device="cpu", compute_dtype="bfloat16")
    assert torch.equal(again.logits(TOKENS), before)
