"""Which modules of a quantized checkpoint are packed: its headers say so, in whatever words its config does."""

from __future__ import annotations

import polyquant
import pytest
from polyquant.loading.records import total
from polyquant.testing.checkpoints import changed_copy
from polyquant.testing.models import tiny_model

SKIPPED = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")
WORDS = {  # a backend, its preset's options, and how others write the same list
    "bitsandbytes": ({"bits": 4}, "llm_int8_skip_modules", ["lm_head", "down_proj"]),
    "torchao": ({}, "modules_to_not_convert", ["lm_head", "down_proj"]),
    "quanto": ({}, "modules_to_not_convert", ["lm_head", "down_proj"]),
    "hqq": ({}, "skip_modules", ["lm_head", "down_proj"]),
    "fp8": ({}, "modules_to_not_convert", ["lm_head", "down_proj"]),
}


@pytest.mark.parametrize("backend", WORDS)
@pytest.mark.parametrize("short", [True, False], ids=["short names", "none"])
def test_a_plan_counts_what_the_headers_show(tmp_path, backend, short):
    options, key, names = WORDS[backend]
    loaded = polyquant.load(
        tiny_model("llama", tmp_path), backend, device="cpu", skip=("down_proj",), compute_dtype="bfloat16", **options
    )
    saved = loaded.save(tmp_path / "saved")
    words = changed_copy(
        saved, tmp_path / "words", stored=lambda stored: stored.update({key: names if short else None})
    )
    plan = polyquant.plan(words, backend, device="cpu", compute_dtype="bfloat16")
    dense = {tensor.name.removesuffix(".weight") for tensor in plan.tensors
             if tensor.role in ("linear", "head") and not tensor.quantized}  # fmt: skip
    assert dense == {*SKIPPED, "lm_head"}
    assert plan.weights_planned_bytes == total(loaded.layers)
