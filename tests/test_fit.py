"""What a checkpoint holds against what its model needs: anything else is refused by name, in plans and in loads."""

from __future__ import annotations

import json

import polyquant
import pytest
import torch
import transformers
from polyquant.errors import ModelError
from polyquant.models import fit
from polyquant.models.model import Model
from polyquant.testing.checkpoints import assert_verified, changed_copy, put, replaced, without
from polyquant.testing.models import SIZES, tiny_model
from safetensors.torch import load_file, save_file

ON_THE_FLY = [name for name in polyquant.backends(on_the_fly=True).names if not polyquant.backend(name).problems("cpu")]
DENSE = {"mlx": {"vocabulary": "dense"}}  # options of those that pack embeddings and heads unless they are told not to
SAVING = [name for name in ON_THE_FLY if polyquant.backend(name).can("save") and name != "gguf"]  # a format of its own
UP, NORM, HEAD = "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"
BIAS, EMBEDDING = "model.layers.0.self_attn.q_proj.bias", "model.embed_tokens.weight"
MISFITS = {
    "a projection": ("llama", without(UP), rf"{UP} of the model is not in the checkpoint"),
    "a norm": ("llama", without(NORM), rf"{NORM} of the model is not in the checkpoint"),
    "the head": ("llama", without(HEAD), rf"{HEAD} of the model is not in the checkpoint"),
    "the embedding": ("llama-tied", without(EMBEDDING), f"{EMBEDDING}.* not in the checkpoint"),
    "a bias": ("qwen2", without(BIAS), rf"{BIAS} of the model is not in the checkpoint"),
    "an expert": (
        "mixtral", without("model.layers.0.block_sparse_moe.experts.3.w1.weight"), "model.layers.0.mlp.experts",
    ),
    "a layer more": ("llama", put({"model.layers.2.mlp.up_proj.weight": torch.zeros(512, 256)}), "is not in the model"),
    "a bias more": ("llama", put({BIAS: torch.zeros(256)}), rf"{BIAS} of the checkpoint is not in the model"),
    "another shape": ("llama", replaced(UP, lambda tensor: tensor[:500]), rf"{UP} has the shape \(500, 256\)"),
}  # fmt: skip


def changed(tmp_path, architecture, change):
    return changed_copy(tiny_model(architecture, tmp_path), tmp_path / "changed", change)


@pytest.mark.parametrize("case", MISFITS)
def test_a_plan_names_what_does_not_fit(tmp_path, case):
    architecture, change, message = MISFITS[case]
    with pytest.raises(ModelError, match=message):
        polyquant.plan(changed(tmp_path, architecture, change), "quanto")


@pytest.mark.parametrize("backend", ON_THE_FLY)
@pytest.mark.parametrize("case", ["a projection", "a norm", "the head", "a bias"])
def test_no_backend_loads_random_numbers(tmp_path, backend, case):
    architecture, change, message = MISFITS[case]
    with pytest.raises(ModelError, match=message):
        polyquant.load(changed(tmp_path, architecture, change), backend, device="cpu")


@pytest.mark.parametrize("case", MISFITS)
def test_names_alone_tell_the_same_as_transformers(tmp_path, case):
    """Before transformers 5 the names are compared here; both ways must find the same, for each case."""
    architecture, change, _ = MISFITS[case]
    model = Model.find(changed(tmp_path, architecture, change))
    if architecture == "mixtral":
        pytest.skip("transformers 5 fuses experts, which earlier ones hold apart")
    skeleton = model.skeleton("float32")
    tensors = {name: torch.empty(found.shape, device="meta") for name, found in model.outline.tensors.items()}
    by_names, reported = fit._misfit_by_names(skeleton, tensors), fit.misfit(skeleton, tensors)
    assert any(by_names)
    assert [sorted(names) for names in by_names] == [sorted(names) for names in reported]


def test_what_transformers_ignores_is_ignored(tmp_path):
    inv_freq = put({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(32)})
    folder = changed(tmp_path, "llama", inv_freq)
    assert polyquant.plan(folder, "hqq").tensors
    assert_verified(polyquant.load(folder, "hqq", device="cpu"))


def test_pickles_have_no_header_and_are_held_against_the_model_as_they_load(tmp_path):
    folder = changed_copy(tiny_model("llama", tmp_path), tmp_path / "pickled")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({name: tensor for name, tensor in tensors.items() if name != UP}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=f"{UP} of the model is not in the checkpoint"):
        polyquant.load(folder, "bitsandbytes", device="cpu", allow_pickle=True)


@pytest.mark.parametrize("backend", SAVING)
@pytest.mark.parametrize("name", [NORM, HEAD, "model.layers.1.input_layernorm.weight"])
def test_a_packed_checkpoint_without_a_dense_tensor(tmp_path, backend, name):
    loaded = polyquant.load(tiny_model("llama", tmp_path), backend, device="cpu", **DENSE.get(backend, {}))
    broken = changed_copy(loaded.save(tmp_path / "saved"), tmp_path / "broken", without(name))
    for broken_way in (polyquant.plan, polyquant.load):
        with pytest.raises(ModelError, match=name):
            broken_way(broken, backend, device="cpu")


OTHERS = {
    "reward": ("Llama", "LlamaForSequenceClassification", {"num_labels": 2}),
    "embedder": ("Llama", "LlamaModel", {}),
    "masked": ("Bert", "BertForMaskedLM", {}),
    "classifier": ("Bert", "BertForSequenceClassification", {}),
    "translator": ("Bart", "BartForConditionalGeneration", {
        "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    }),
    "speech": ("Whisper", "WhisperForConditionalGeneration", {
        "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 1,
    }),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_of_another_class_is_refused_as_what_it_is(tmp_path, kind):
    family, name, sizes = OTHERS[kind]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, "num_hidden_layers": 1, **sizes})
    getattr(transformers, name)(config).save_pretrained(tmp_path / "model")
    for way in (polyquant.plan, polyquant.load):
        with pytest.raises(
            ModelError, match=f"is a {name}, and would load as .*only causal language models are loaded"
        ):
            way(tmp_path / "model", "bitsandbytes", device="cpu")


def test_classes_that_transformers_does_not_know_are_left_to_the_tensors(tmp_path):
    folder = changed_copy(tiny_model("llama", tmp_path), tmp_path / "renamed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LLaMAForCausalLM"]}))
    assert polyquant.plan(folder, "hqq").tensors


TIES = {  # does the config tie, which tensors are there
    "tied": (True, (EMBEDDING,)),
    "only the head stored": (True, (HEAD,)),
    "tied, and two that differ": (True, (EMBEDDING, HEAD)),
    "two": (False, (EMBEDDING, HEAD)),
}


@pytest.mark.parametrize("backend", SAVING)
@pytest.mark.parametrize("case", TIES)
def test_the_checkpoint_decides_what_is_tied_and_saving_keeps_it(tmp_path, backend, case):
    ties, stored = TIES[case]
    folder = changed_copy(tiny_model("llama", tmp_path), tmp_path / "changed")
    tensors = load_file(folder / "model.safetensors")
    for name in {EMBEDDING, HEAD}.difference(stored):
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": ties}))

    loaded = polyquant.load(folder, backend, device="cpu", compute_dtype="float32", **DENSE.get(backend, {}))
    for name in stored:
        held = loaded.model.get_input_embeddings() if name == EMBEDDING else loaded.model.get_output_embeddings()
        assert torch.equal(held.weight.float(), tensors[name]), name
    assert_verified(loaded)
    again = polyquant.load(loaded.save(tmp_path / "saved"), device="cpu", compute_dtype="float32")
    assert_verified(again)
    tokens = list(range(20, 40))
    assert torch.equal(again.logits(tokens), loaded.logits(tokens))
