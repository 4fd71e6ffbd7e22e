"""Mixtures whose checkpoints hold FP8 experts one by one: Qwen3-MoE, DeepSeek-V3, Mixtral, as transformers reads them."""

import json

import polyquant
import pytest
import torch
from polyquant.errors import ModelError
from polyquant.plugin.layers import LinearExperts
from polyquant.testing.checkpoints import assert_verified, changed_copy, without
from polyquant.testing.models import ONE_BY_ONE, SIZES, tiny_model, write_random
from polyquant.testing.reference import logits_by_transformers
from polyquant_fp8._decode import quantize
from safetensors.torch import load_file, save_file

from .conftest import load

TOKENS = [3, 4, 5, 6, 7, 8, 9, 10]
BLOCK = (64, 64)
STORED = {
    "quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic",
    "modules_to_not_convert": ["lm_head"],
}  # fmt: skip
EXPERT = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.2.w3", "qwen3-moe": "model.layers.1.mlp.experts.2.up_proj",
    "deepseek-v3": "model.layers.1.mlp.experts.2.up_proj",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(folder):
    """Name of an architecture -> its checkpoint, whose linear layers and experts are FP8, one matrix a tensor."""

    def make(name):
        out = folder / f"fp8-{name}"
        if out.exists():
            return out
        architecture, sizes = ONE_BY_ONE[name]
        write_random(architecture, {**SIZES, **sizes}, out, tiny_model("llama", folder))
        tensors = load_file(out / "model.safetensors")
        for tensor in [
            each for each in tensors if each.endswith("proj.weight") or ".experts." in each or "_a_" in each
        ]:
            if tensors[tensor].dim() == 2 and "gate.weight" not in tensor and "layernorm" not in tensor:
                tensors[tensor], tensors[f"{tensor}_scale_inv"] = quantize(tensors[tensor], BLOCK)
        if name == "deepseek-v3":  # a layer for predicting several tokens, which its class leaves out
            extra = "model.layers.61.self_attn.o_proj.weight"
            tensors[extra], tensors[f"{extra}_scale_inv"] = quantize(torch.ones(64, 64), BLOCK)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | {"quantization_config": STORED}))
        return out

    return make


@pytest.mark.parametrize("kernel", ["library", "packed"])
@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_mixtures_answer_as_transformers_dense_ones(made, tmp_path, name, kernel):
    path = made(name)
    loaded = load(path, kernel=kernel, embeddings="keep", head="keep", compute_dtype="float32")
    assert_verified(loaded)
    dense = {layer.name for layer in loaded.layers if layer.role in ("linear", "experts") and not layer.quantized}
    assert not {each for each in dense if "gate.weight" not in each}
    torch.testing.assert_close(loaded.logits(TOKENS), logits_by_transformers(path, TOKENS), rtol=1e-4, atol=1e-4)
    assert any(isinstance(module, LinearExperts) for module in loaded.model.modules()) == (kernel == "library")
    saved = loaded.save(tmp_path / "saved")
    before, after = load_file(path / "model.safetensors"), load_file(saved / "model.safetensors")
    routers = {
        each: each.replace("block_sparse_moe.gate", "mlp.gate") for each in before if ".61." not in each
    }  # as the model's
    assert set(routers.values()) == set(after)
    assert all(torch.equal(before[each].view(torch.uint8), after[to].view(torch.uint8)) for each, to in routers.items())
    again = load(saved, kernel=kernel, embeddings="keep", head="keep", compute_dtype="float32")
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))


def test_planned_bytes_are_those_that_are_stored(made):
    path = made("qwen3-moe")
    planned = polyquant.plan(path, "fp8", device="cpu", kernel="library")
    loaded = load(path, kernel="library")
    experts = [layer for layer in loaded.layers if layer.role == "experts"]
    assert len(experts) == 4
    assert sum(layer.stored_bytes for layer in loaded.layers) == pytest.approx(planned.weights_planned_bytes, rel=0.01)


def test_adapters_get_gradients_through_experts(made):
    from peft import LoraConfig, get_peft_model

    loaded = load(made("qwen3-moe"), kernel="library")
    model = loaded.backend.prepare_for_training(loaded)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).train()
    ids = torch.tensor([TOKENS])
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [each.grad for name, each in model.named_parameters() if "lora_" in name]
    assert len(gradients) == 4
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("part", ["weight", "weight_scale_inv"])
def test_a_part_that_is_missing_is_told(made, tmp_path, part):
    path = changed_copy(made("qwen3-moe"), tmp_path, without(f"{EXPERT['qwen3-moe']}.{part}"))
    with pytest.raises(ModelError, match=rf"layers\.1\.mlp\.experts.*{part} of one of its matrices is missing"):
        load(path)


def test_an_expert_that_is_missing_is_told(made, tmp_path):
    def drop(tensors):
        for each in [each for each in tensors if ".experts.3." in each]:
            del tensors[each]

    with pytest.raises(ModelError, match="experts should be 0 to 3, and expert 3 is missing"):
        load(changed_copy(made("qwen3-moe"), tmp_path, drop))


def test_matrices_in_parts_of_blocks_are_not_put_together(made, tmp_path):
    path = changed_copy(made("qwen3-moe"), tmp_path, None, lambda found: found.update(weight_block_size=[96, 64]))
    with pytest.raises(ModelError, match=r"matrices of 128 rows, .* and blocks of 96 rows|should be"):
        load(path)
