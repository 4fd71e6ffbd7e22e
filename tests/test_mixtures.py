"""A mixture in 4 bit is 4 bit: experts too, by every backend that quantizes them while loading, as planned."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import polyquant
import pytest
import torch
import transformers
from polyquant.errors import ConfigError
from polyquant.testing.models import SIZES, _tokenizer

EIGHT = {"num_experts_per_tok": 2, "num_hidden_layers": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 8}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 8, "moe_intermediate_size": 512, "norm_topk_prob": True}),
    "gpt_oss": ("GptOss", {"num_local_experts": 8}),
}
REFUSING = ("fp-quant", "gemma", "higgs")
"""Backends whose formats have no place for fused experts: they say so, and how to keep those dense."""


def four_bit_presets(backend: str) -> list[Any]:
    """The presets of a backend that make weights of 4 bits; one that only reads such has none."""
    handle = polyquant.backend(backend)
    return [preset for preset in handle.info.presets.values() if handle.config(preset).weight_bits == 4]


BACKENDS = [
    name for name in polyquant.backends(on_the_fly=True, bits=4).names
    if four_bit_presets(name) and not polyquant.backend(name).problems("cpu")
]  # fmt: skip
OTHERWISE: dict[str, dict[str, Any]] = {
    "mxfp4": {"linears": "quantize"},  # which leaves attention dense, as gpt-oss has it
}
MOST = 0.35  # of the bytes in bfloat16


@pytest.fixture(scope="module", params=KINDS)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, sizes = KINDS[request.param]
    folder = tmp_path_factory.mktemp("mixtures") / request.param
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **EIGHT, **sizes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        getattr(transformers, f"{name}ForCausalLM")(config).bfloat16().save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def in_four_bits(backend: str) -> dict[str, Any]:
    """The options of a backend's first preset of 4 bits; experts that its library leaves dense by the packed runtime."""
    fields = polyquant.backend(backend).info.options.__struct_fields__
    more = {"kernel": "packed" if "experts" in fields else "library"} if "kernel" in fields else {}
    return {
        **four_bit_presets(backend)[0],
        **OTHERWISE.get(backend, {}),
        "device": "cpu",
        "compute_dtype": "bfloat16",
        **more,
    }


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in REFUSING])
def test_a_mixture_in_four_bits_is_four_bits(mixture: Path, backend: str) -> None:
    loaded = polyquant.load(mixture, backend, **in_four_bits(backend))
    report = polyquant.verify(loaded, max_new_tokens=2)
    assert report.passed, report.failures
    dense = [layer.name for layer in report.layers if layer.role in ("linear", "experts") and not layer.quantized]
    assert not dense, "all that multiplies in the blocks is quantized"
    assert sum(layer.role == "experts" for layer in report.layers) == 4
    memory = report.memory
    assert abs(memory.weights_stored_bytes - memory.weights_planned_bytes) <= 0.01 * memory.weights_planned_bytes
    in_bfloat16 = 2 * sum(prod(layer.shape) for layer in report.layers if layer.role != "buffer")
    assert memory.weights_stored_bytes <= MOST * in_bfloat16


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in REFUSING])
def test_where_a_format_has_no_place_for_experts_it_says_so(mixture: Path, backend: str) -> None:
    with pytest.raises(ConfigError, match=r"experts.*skip="):
        polyquant.load(mixture, backend, **in_four_bits(backend))
