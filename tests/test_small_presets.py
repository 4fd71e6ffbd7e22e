"""The preset `small`: 4 bits with embedding and head in 8, of every backend that rounds to 4 bits while loading."""

from __future__ import annotations

import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import polyquant
import pytest
from polyquant.errors import ConfigError
from polyquant.measure.quality.divergence import kl_divergence
from polyquant.registry.written import IN_EIGHT, SMALL, presets
from polyquant.testing.models import tiny_model
from polyquant.testing.texts import EVALUATION

CARDS = [
    info for info in polyquant.backends(on_the_fly=True, bits=4) if not polyquant.backend(info.name).problems("cpu")
]
HAVING = [info.name for info in CARDS if SMALL in presets(info)]
TOKENS = list(range(5, 29))
MOST, ALLOWED = 0.36, 0.005  # of the bytes in bfloat16; KL to the same weights with a dense embedding, in nats


def test_those_that_round_to_four_bits_have_it() -> None:
    assert {"bitsandbytes", "hqq", "quanto", "gguf", "nvfp4"} <= set(HAVING)
    assert SMALL not in presets(polyquant.backend("fp8").info)  # 8 bits
    assert SMALL not in presets(polyquant.backend("gptq").info)  # not while loading
    with pytest.raises(ConfigError, match="fp8 has no preset 'small'; there are"):
        polyquant.load("nowhere", "fp8:small")


def test_a_list_of_backends_imports_none_of_them() -> None:
    code = "import sys, polyquant; str(polyquant.backends(bits=4)); print(sorted(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "polyquant.registry" in said
    assert "polyquant_" not in said


@pytest.mark.parametrize("backend", HAVING)
@pytest.mark.parametrize("model", ["llama", "llama-tied"])
def test_embedding_and_head_are_in_eight_bits(model: str, backend: str, tmp_path: Path) -> None:
    loaded = polyquant.load(tiny_model(model, tmp_path), f"{backend}:{SMALL}", device="cpu")
    report = polyquant.verify(loaded, max_new_tokens=2)
    assert report.passed, report.failures
    found = {
        layer.role: layer.bits for layer in loaded.layers if layer.role in ("embedding", "head") and layer.quantized
    }
    assert found == dict.fromkeys(("embedding",) if model == "llama-tied" else ("embedding", "head"), 8)


@pytest.mark.real
@pytest.mark.parametrize("backend", ["bitsandbytes", "hqq"])
def test_a_real_model_is_a_third_and_no_worse(backend: str) -> None:
    loaded: Any = polyquant.load("builtin:smollm2", f"{backend}:{SMALL}", device="cpu", kernel="packed")
    dense = polyquant.load(
        "builtin:smollm2", f"{backend}:{SMALL}", device="cpu", kernel="packed", **dict.fromkeys(IN_EIGHT, "keep")
    )
    in_bfloat16 = 2 * sum(prod(layer.shape) for layer in loaded.layers if layer.role != "buffer")
    assert sum(layer.stored_bytes for layer in loaded.layers) <= MOST * in_bfloat16
    tokens = loaded.tokenizer(EVALUATION, add_special_tokens=False).input_ids[:160]
    assert 0 < kl_divergence(dense.logits(tokens), loaded.logits(tokens)).mean() < ALLOWED
