"""Experts in FP4 beside FP8 layers, against the dense model that transformers makes of the checkpoint."""

import json

import polyquant
import pytest
import torch
from polyquant.errors import ModelError
from polyquant.plugin.layers import LinearExperts
from polyquant.testing.checkpoints import assert_verified, changed_copy, without
from polyquant.testing.models import tiny_model
from polyquant.testing.reference import logits_by_transformers
from safetensors.torch import load_file

from .conftest import load
from .fp4 import DEEPSEEK_V4, write_fp4

TOKENS = [3, 4, 5, 6, 7, 8, 9, 10]
EXPERT = "model.layers.1.mlp.experts.2.up_proj"
DIALECTS = {
    "usual": {}, "unsaid": {"says": False}, "deepseek-v4": {"model": DEEPSEEK_V4, "named": "scale"}
}  # fmt: skip


@pytest.fixture(scope="module")
def made(folder):
    """Name of a dialect -> its checkpoint."""

    def make(name="usual"):
        out = folder / f"fp4-{name}"
        return out if out.exists() else write_fp4(tiny_model("llama", folder), out, **DIALECTS[name])

    return make


@pytest.mark.parametrize("kernel", ["library", "packed"])
@pytest.mark.parametrize("name", DIALECTS)
def test_it_answers_as_transformers_dense_one(made, tmp_path, name, kernel):
    path = made(name)
    options = {"kernel": kernel, "embeddings": "keep", "head": "keep", "compute_dtype": "float32"}
    loaded = load(path, **options)
    assert_verified(loaded)
    found = {layer.scheme: layer.bits for layer in loaded.layers if layer.quantized}
    assert found == {"fp8-e4m3": 8, "fp4-e2m1": 4}
    assert not any("stay dense" in note or note.startswith("0 layers") for note in loaded.notes)
    assert any(isinstance(module, LinearExperts) for module in loaded.model.modules()) == (kernel == "library")
    torch.testing.assert_close(loaded.logits(TOKENS), logits_by_transformers(path, TOKENS), rtol=1e-3, atol=5e-4)
    saved = loaded.save(tmp_path / "saved")
    assert json.loads((saved / "config.json").read_text())["quantization_config"]["expert_dtype"] == "fp4"
    before, after = load_file(path / "model.safetensors"), load_file(saved / "model.safetensors")
    for key in (each for each in before if ".experts." in each):
        assert before[key].dtype == after[key].dtype
        assert torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)), key
    assert [each for each in after if ".experts." in each] == [each for each in before if ".experts." in each]
    assert torch.equal(load(saved, **options).logits(TOKENS), loaded.logits(TOKENS))


def test_every_expert_is_what_transformers_dequantizes(made):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    path = made()
    stack = load(path, kernel="library").model.model.layers[1].mlp.experts.down_proj
    tensors = load_file(path / "model.safetensors")
    for number, found in enumerate(stack.expert_weights()):
        parts = (
            tensors[f"model.layers.1.mlp.experts.{number}.down_proj.{part}"] for part in ("weight", "weight_scale_inv")
        )
        assert torch.equal(found, Fp8Dequantize(None)._dequantize_one(*parts, output_dtype=torch.float32))


def test_planned_bytes_are_those_that_are_stored(made):
    for kernel in ("library", "packed"):
        planned = polyquant.plan(made(), "fp8", device="cpu", kernel=kernel)
        loaded = load(made(), kernel=kernel)
        assert sum(layer.stored_bytes for layer in loaded.layers) == pytest.approx(
            planned.weights_planned_bytes, rel=0.01
        )


def damaged(tensors):
    tensors[f"{EXPERT}.weight_scale_inv"].view(torch.uint8)[0, 0] = 255


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(f"{EXPERT}.weight_scale_inv"), "expert 2: weight_scale_inv of one of its matrices is missing"),
        (damaged, "expert 2: weight_scale_inv of a layer .* holds NaN or infinity"),
        (lambda t: t.update({f"{EXPERT}.weight": t[f"{EXPERT}.weight"][:, :-1].contiguous()}), "expert 2: weight of its matri"),
    ],
)  # fmt: skip
def test_damage_is_told_with_the_expert(made, tmp_path, change, words):
    with pytest.raises(ModelError, match=rf"layers\.1\.mlp\.experts\.gate_up_proj cannot be read: {words}"):
        load(changed_copy(made(), tmp_path, change))


def test_emulated_activations_are_those_of_the_experts_too(made):
    loaded = load(made(), emulate_activations=True, compute_dtype="float32")
    experts = loaded.model.model.layers[1].mlp.experts
    stack = experts.gate_up_proj
    expert = stack.expert(0)
    inputs = torch.randn(3, expert.in_features, generator=torch.Generator().manual_seed(0))
    seen = expert.inputs(inputs)
    assert not torch.equal(seen, inputs)
    torch.testing.assert_close(expert(inputs), seen @ expert.dequantize().T)
    assert not any("activations stay in" in note for note in loaded.notes)
