"""GPTQ on small random models: reading the dialects, damaged checkpoints, making checkpoints, training."""

import json
import os

import polyquant
import pytest
import torch
from polyquant.errors import CheckpointConflict, ConfigError, ModelError
from polyquant.plugin.process import kept_processes
from polyquant.testing.checkpoints import assert_verified
from polyquant.testing.models import tiny_model
from polyquant.testing.state import differences, snapshot
from polyquant.testing.texts import CALIBRATION
from transformers import AutoModelForCausalLM

TOKENS = [3, 4, 5, 6, 7, 8, 9]
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def method():
    return "gptq"


def load(path, **options):
    return polyquant.load(path, device="cpu", **options)


def quantize(model, out, calibration=CALIBRATION, **options):
    return polyquant.quantize(model, "gptq", out, calibration=calibration, device="cpu", **options)


def logits_of(model):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([TOKENS])).logits[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 5}, "bits must be 2, 3, 4 or 8, got 5"),
        ({"group_size": 100}, "group_size must be -1, 16, 32"),
        ({"kernel": "cuda"}, "kernel must be 'auto', 'packed', 'library'"),
        ({"wbits": 4}, "unknown option 'wbits'"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        polyquant.load("nowhere", "gptq", **options)


VARIANTS = [
    {"bits": 2, "group_size": 32, "layout": "gptq_v2", "sym": False},
    {"bits": 3, "group_size": 64, "layout": "gptq", "sym": False},
    {"bits": 3, "group_size": 64, "layout": "gptq_v2", "order": True},
    {"bits": 4, "group_size": -1, "layout": "gptq"},
    {"bits": 4, "group_size": 128, "layout": "gptq", "sym": False},
    {"bits": 4, "group_size": 32, "layout": "gptq_v2", "sym": False, "order": True},
    {"bits": 8, "group_size": 64, "layout": "gptq"},
    {"bits": 8, "group_size": 16, "layout": "gptq_v2", "sym": False, "order": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
def test_a_packed_model_is_its_dequantized_one(folder, tmp_path, variant, packing):
    """In float32 to rounding; in bfloat16 each layer to bfloat16's own rounding of scales and weights."""
    path = packing.write_gptq(tiny_model("qwen2", folder), tmp_path / "out", **variant)
    dense = packing.equal_dense(path)
    exact = load(path, compute_dtype="float32")
    assert_verified(exact)
    torch.testing.assert_close(exact.logits(TOKENS), logits_of(dense), rtol=1e-3, atol=1e-3)
    rounded = load(path)
    aten = variant["bits"] == 4 and variant["group_size"] > 0
    assert (rounded.config.kernel, exact.config.kernel) == ("torch_aten" if aten else "torch", "torch")
    assert_verified(rounded)
    packing.assert_layers_multiply_with(dense, rounded, torch.bfloat16)


def test_auto_gptq_checkpoints(checkpoint, copy, packing):
    """Config beside config.json, without method and format; its own file name; biases of zeros; old rotary buffers."""
    packing.change_config(copy, quantization_config=None)
    old = {"bits": 4, "group_size": 64, "damp_percent": 0.01, "desc_act": False, "sym": True, "true_sequential": True}
    (copy / "quantize_config.json").write_text(json.dumps(old | {"model_file_base_name": "model"}))

    def change(tensors):
        tensors[f"{UP}.bias"] = torch.zeros(512, dtype=torch.float16)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)
        del tensors[f"{UP}.g_idx"]

    packing.change_tensors(copy, change)
    (copy / "model.safetensors").rename(copy / "gptq_model-4bit-64g.safetensors")
    loaded = load(copy)
    assert loaded.backend.name == "gptq"
    assert_verified(loaded)
    assert torch.equal(loaded.logits(TOKENS), load(checkpoint).logits(TOKENS))


def test_a_bias_that_is_not_zero_has_no_place(copy, packing):
    packing.change_tensors(copy, lambda tensors: tensors.update({f"{UP}.bias": torch.ones(512)}))
    with pytest.raises(ModelError, match=rf"{UP} cannot be read: bias has no place beside"):
        load(copy)


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"bits": 5}, "Invalid enum value 5"),
        ({"group_size": 48}, "Invalid enum value 48"),
        ({"checkpoint_format": "bitblas"}, "its format is 'bitblas', and gptq, gptq_v2, marlin are read"),
        ({"is_marlin_format": True, "sym": False}, "its format is 'marlin', which has symmetric 4-bit weights"),
        ({"is_marlin_format": True}, "cannot be read: B, s is missing; it has g_idx, qweight, qzeros, scales"),
        ({"pack_dtype": "int16"}, "packed in int16"),
        ({"dynamic": {".*up_proj": {"bits": 8}}}, r"gives layers different options \(.*up_proj\)"),
    ],
)
def test_what_is_not_read_is_refused(copy, stored, words, packing):
    packing.change_stored(copy, **stored)
    with pytest.raises(ModelError, match=words):
        load(copy)


@pytest.mark.parametrize(("stored", "tensor"), [({"bits": 8}, "qweight"), ({"group_size": 32}, "qzeros")])
def test_a_config_that_does_not_fit_the_tensors(copy, stored, tensor, packing):
    packing.change_stored(copy, **stored)
    with pytest.raises(ModelError, match=rf"{tensor} of a layer .* should be"):
        load(copy)


def test_layers_that_the_checkpoint_leaves_dense_stay_dense(folder, tmp_path, packing):
    """gptqmodel's rules are patterns; what is dense shows in the tensors."""
    path = packing.write_gptq(tiny_model("llama", folder), tmp_path / "out", keep=("up_proj", "o_proj"))
    stored = json.loads((path / "config.json").read_text())["quantization_config"]
    packing.change_config(path, quantization_config=stored | {"dynamic": {"-:.*(up|o)_proj": {}}})
    loaded = load(path, compute_dtype="float32")
    assert_verified(loaded)
    assert any("5 layers are dense in the checkpoint" in note for note in loaded.notes)  # with the head
    assert not {layer.name for layer in loaded.layers if layer.quantized and "up_proj" in layer.name}
    torch.testing.assert_close(loaded.logits(TOKENS), logits_of(packing.equal_dense(path)), rtol=1e-3, atol=1e-3)


def test_kernels(checkpoint):
    fast, plain = load(checkpoint), load(checkpoint, kernel="torch")
    assert (fast.kernel, plain.kernel) == ("gptqmodel TorchAtenLinear", "gptqmodel TorchLinear")
    assert_verified(plain)
    torch.testing.assert_close(fast.logits(TOKENS), plain.logits(TOKENS), rtol=0.1, atol=0.25)
    with pytest.raises(ConfigError, match="'torch_aten' cannot be used on cpu: it computes in bfloat16 or float16"):
        load(checkpoint, kernel="torch_aten", compute_dtype="float32")
    with pytest.raises(ConfigError, match="kernel 'marlin' cannot be used on cpu: it needs a GPU"):
        load(checkpoint, kernel="marlin")


def test_a_checkpoint_that_is_made(folder, tmp_path, capfd):
    """Skipped modules, fitted zero points; the process stays as it was; no traces in the files."""
    model = tiny_model("llama", folder)
    before = snapshot()
    capfd.readouterr()
    out = quantize(model, tmp_path / "out", sym=False, group_size=32, skip=("layers.0.mlp", "k_proj"))
    assert capfd.readouterr() == ("", "")
    assert not differences(before, snapshot())
    assert "/tmp" not in (out / "config.json").read_text()
    assert not list(out.glob("*.csv"))
    assert (out / "generation_config.json").read_bytes() == (model / "generation_config.json").read_bytes()
    loaded = load(out)
    assert_verified(loaded)
    assert not loaded.notes
    dense = {layer.name for layer in loaded.layers if layer.role in ("linear", "head") and not layer.quantized}
    mlp = {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert dense == mlp | {f"model.layers.{index}.self_attn.k_proj.weight" for index in range(2)} | {"lm_head.weight"}
    assert (loaded.config.sym, loaded.config.group_size) == (False, 32)
    stored = json.loads((out / "config.json").read_text())["quantization_config"]
    assert stored["checkpoint_format"] == "gptq_v2"
    with pytest.raises(CheckpointConflict, match="sym: requested True, stored False"):
        load(out, sym=True)


def test_the_output_head_on_request_and_progress(folder, tmp_path, capfd, monkeypatch):
    monkeypatch.delitem(os.environ, "PYTEST_CURRENT_TEST")  # the library draws nothing under pytest
    with kept_processes():  # a process that starts here, and prints to what is captured
        out = quantize(tiny_model("llama", folder), tmp_path / "out", skip_defaults=False, progress=True)
    assert "gptq" in capfd.readouterr().err  # a bar on a terminal, lines of a log in CI
    loaded = load(out)
    assert_verified(loaded)
    assert {layer.name for layer in loaded.layers if layer.quantized} >= {"lm_head.weight"}
    assert not loaded.config.skip_defaults


def test_calibration_pays(folder, tmp_path, packing):
    """On calibration-like text the output of a layer is closer than with weights rounded to nearest."""
    dense = tiny_model("llama", folder)
    rounded = load(packing.write_gptq(dense, tmp_path / "rounded", bits=3, group_size=128), compute_dtype="float32")
    made = load(quantize(dense, tmp_path / "made", bits=3, group_size=128), compute_dtype="float32")
    tokens = rounded.tokenizer(" ".join(CALIBRATION), add_special_tokens=False).input_ids[:256]
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(dense)(torch.tensor([tokens])).logits[0]
    error = [(loaded.logits(tokens) - expected).square().mean() for loaded in (rounded, made)]
    assert error[1] < error[0]


@pytest.mark.parametrize("variant", [{}, {"order": True, "group_size": 32}, {"bits": 8}], ids=["int4", "order", "int8"])
def test_adapters_get_the_gradients_of_the_dequantized_model(folder, tmp_path, variant, packing):
    path = packing.write_gptq(tiny_model("qwen2", folder), tmp_path / "out", **variant)
    packing.assert_adapters_train_as_on(packing.equal_dense(path), load(path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index + 100, "g_idx holds 100 to 103, and 0 to 3 is possible"),
        (lambda index: index - 1, "g_idx holds -1 to 2"),
        (lambda index: index.float(), r"g_idx of a layer .* int32, and is \(256,\) float32"),
        (lambda index: index[:-1].clone(), r"g_idx of a layer .* \(256,\) int32, and is \(255,\) int32"),
    ],
    ids=["beyond", "before", "dtype", "short"],
)
def test_columns_of_groups_that_are_not_there_are_refused(copy, packing, change, words):
    packing.change_tensors(copy, lambda tensors: tensors.update({f"{UP}.g_idx": change(tensors[f"{UP}.g_idx"])}))
    with pytest.raises(ModelError, match=f"{UP} cannot be read: {words}"):
        load(copy)


def test_reordered_columns_without_their_order_are_refused(folder, tmp_path, packing):
    path = packing.write_gptq(tiny_model("llama", folder), tmp_path / "out", order=True)
    packing.change_tensors(path, lambda tensors: tensors.pop(f"{UP}.g_idx"))
    with pytest.raises(ModelError, match=f"{UP} cannot be read: g_idx is missing"):
        load(path)
