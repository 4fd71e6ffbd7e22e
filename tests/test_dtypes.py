"""Which dtype each tensor is loaded in: what transformers keeps in float32, and what the files hold, not their config."""

from __future__ import annotations

import json

import polyquant
import pytest
import torch
import transformers
from polyquant.errors import ModelError
from polyquant.testing.checkpoints import changed_copy, replaced
from polyquant.testing.models import SIZES, _tokenizer, tiny_model
from safetensors.torch import load_file, save_file

from .test_fit import ON_THE_FLY, SAVING

NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
MIXTURE = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1}
NO_EXPERTS = ("fp8", "fouroversix", "eetq", "fbgemm-fp8", "fp-quant", "gemma", "higgs", "mlx")
"""Backends that refuse the fused experts of one of these models, by their library's kernel."""
ODD = {  # layers of DeepseekV3 whose sizes do not fit one
    "eetq": ("kv_a_proj_with_mqa",),
    "higgs": ("q_a_proj", "kv_a_proj_with_mqa"),
}
KEPT = {  # transformers' classes that keep tensors in float32: sizes, compute dtype, tensors
    "GptOss": (MIXTURE, "float16", ("model.norm.weight", "model.layers.0.input_layernorm.weight")),
    "DeepseekV3": (
        {
            **SIZES, "head_dim": 32, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "n_group": 1, "topk_group": 1, "moe_intermediate_size": 128, "kv_lora_rank": 64, "q_lora_rank": 64,
            "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64, "num_key_value_heads": 4,
        },
        "bfloat16",
        ("model.layers.1.mlp.gate.e_score_correction_bias",),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=KEPT)
def keeping(request, tmp_path_factory):
    """A model with tensors that stay in float32; its folder, the compute dtype that would cast them, and their names."""
    sizes, dtype, names = KEPT[request.param]
    if not hasattr(transformers, f"{request.param}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {request.param}")
    folder = tmp_path_factory.mktemp("models") / request.param
    torch.manual_seed(0)
    model = getattr(transformers, f"{request.param}ForCausalLM")(
        getattr(transformers, f"{request.param}Config")(**sizes)
    )
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder, dtype, names


@pytest.mark.parametrize("backend", ON_THE_FLY)
def test_what_transformers_keeps_in_float32_stays_there(keeping, backend, tmp_path):
    folder, dtype, names = keeping
    stored = load_file(folder / "model.safetensors")
    odd = ODD.get(backend, ()) if folder.name == "DeepseekV3" else ()
    given = {"skip": ("experts", *odd)} if backend in NO_EXPERTS else {}
    loaded = polyquant.load(folder, backend, device="cpu", compute_dtype=dtype, **given)
    planned = {tensor.name: tensor.stored_bytes for tensor in polyquant.plan(
        folder, backend, device="cpu", compute_dtype=dtype, **given).tensors}  # fmt: skip
    for name in names:
        held = loaded.model.state_dict()[name]
        assert held.dtype == torch.float32, name
        assert torch.equal(held, stored[name].float())
        assert planned[name] == held.nbytes
    failed = [check for check in polyquant.verify(loaded, max_new_tokens=2).failures]
    assert {check.name for check in failed} <= {"sample", "coverage"}, failed  # fused experts stay dense in some
    if backend in SAVING:
        again = polyquant.load(loaded.save(tmp_path / "saved"), device="cpu", compute_dtype=dtype)
        for name in names:
            assert torch.equal(again.model.state_dict()[name], stored[name].float()), name


@pytest.mark.parametrize("backend", ["hqq", "gguf", "fp8", "fouroversix"])
def test_the_dtype_of_the_tensors_is_believed_not_the_configs(tmp_path, backend):
    """float32 weights beyond float16 under "dtype": "float16"."""
    folder = changed_copy(tiny_model("llama", tmp_path), tmp_path / "wide", replaced(UP, lambda tensor: tensor * 1e6))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    loaded = polyquant.load(folder, backend, device="cpu", compute_dtype="float32")
    layer = next(layer for layer in loaded.layers if layer.name == UP)
    assert layer.quantized
    logits = loaded.logits(list(range(20, 30)))
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("backend", ["hqq", "gguf", "fp8", "fouroversix"])
def test_a_dense_tensor_that_the_compute_dtype_cannot_hold_is_named(tmp_path, backend):
    folder = changed_copy(tiny_model("llama", tmp_path), tmp_path / "wide", replaced(NORM, lambda tensor: tensor * 1e6))
    with pytest.raises(ModelError, match=rf"{NORM} holds 1e\+06, and float16 ends at 6.55e\+04; .*compute_dtype"):
        polyquant.load(folder, backend, device="cpu", compute_dtype="float16")


def test_float16_beside_float32_is_read_as_float32(tmp_path):
    folder = changed_copy(tiny_model("llama", tmp_path), tmp_path / "mixed")
    tensors = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors[UP] = tensors[UP].float() * 1e6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    loaded = polyquant.load(folder, "hqq", device="cpu", compute_dtype="float32")
    assert torch.isfinite(loaded.logits(list(range(20, 30)))).all()
