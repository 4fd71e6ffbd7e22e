"""AWQ on small random models: reading the dialects, damaged checkpoints, making checkpoints, training."""

import json

import polyquant
import pytest
import torch
from polyquant.errors import CheckpointConflict, ConfigError, ModelError, SaveError
from polyquant.testing.checkpoints import assert_verified
from polyquant.testing.models import tiny_model
from polyquant.testing.state import differences, snapshot
from polyquant.testing.texts import CALIBRATION

TOKENS = [3, 4, 5, 6, 7, 8, 9]
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def method():
    return "awq"


def load(path, **options):
    return polyquant.load(path, device="cpu", **options)


def quantize(model, out, calibration=CALIBRATION, **options):
    return polyquant.quantize(model, "awq", out, calibration=calibration, device="cpu", **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 3}, "bits must be 4, got 3"),
        ({"group_size": 100}, "group_size must be -1, 16, 32"),
        ({"kernel": "gemv"}, "kernel must be 'auto', 'packed', 'library'"),
        ({"w_bit": 4}, "unknown option 'w_bit'"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        polyquant.load("nowhere", "awq", **options)


VARIANTS = [
    {"group_size": -1},
    {"group_size": 16, "zero_point": False},
    {"group_size": 64},
    {"group_size": 128, "zero_point": False},
    {"group_size": 256},
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
def test_a_packed_layer_is_its_dequantized_one(folder, tmp_path, packing, variant, dtype):
    """To the compute dtype's own rounding of scales and weights."""
    path = packing.write_awq(tiny_model("qwen2", folder), tmp_path / "out", **variant)
    dense, loaded = packing.equal_dense(path), load(path, compute_dtype=dtype)
    assert loaded.config.kernel == ("torch" if variant["group_size"] in (-1, 16) else "torch_aten")
    assert_verified(loaded)
    packing.assert_layers_multiply_with(dense, loaded, getattr(torch, dtype))


def test_autoawq_checkpoints(checkpoint, copy, packing):
    """Config beside config.json, in autoawq's own words."""
    packing.change_config(copy, quantization_config=None)
    old = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    (copy / "quant_config.json").write_text(json.dumps(old))
    loaded = load(copy)
    assert loaded.backend.name == "awq"
    assert_verified(loaded)
    assert torch.equal(loaded.logits(TOKENS), load(checkpoint).logits(TOKENS))


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"bits": 8}, "Invalid enum value 8"),
        ({"group_size": 48}, "Invalid enum value 48"),
        ({"version": "marlin"}, "its version is 'marlin', and 'gemm', 'gemv', 'gemv_fast' is read"),
        ({"version": "gemv"}, r"qweight of a layer \(256, 512\) should be \(256, 64\) int32, and is \(512, 32\) int32"),
        ({"backend": "llm-awq"}, "was written by llm-awq"),
        ({"dynamic": {".*up_proj": {"group_size": 32}}}, r"gives layers different options \(.*up_proj\)"),
    ],
)
def test_what_is_not_read_is_refused(copy, packing, stored, words):
    packing.change_stored(copy, **stored)
    with pytest.raises(ModelError, match=words):
        load(copy)


def test_a_config_that_does_not_fit_the_tensors(copy, packing):
    packing.change_stored(copy, group_size=32)
    with pytest.raises(ModelError, match=r"(qzeros|scales) of a layer .* should be"):
        load(copy)


def test_layers_that_the_checkpoint_leaves_dense_stay_dense(folder, tmp_path, packing):
    path = packing.write_awq(tiny_model("llama", folder), tmp_path / "out", keep=("up_proj", "o_proj"))
    loaded = load(path)
    assert_verified(loaded)
    assert any("5 layers are dense in the checkpoint" in note for note in loaded.notes)  # with the head
    assert not {layer.name for layer in loaded.layers if layer.quantized and "up_proj" in layer.name}


def test_kernels(checkpoint):
    fast, plain = load(checkpoint), load(checkpoint, kernel="torch")
    assert (fast.kernel, plain.kernel) == ("gptqmodel TorchAtenAwqLinear", "gptqmodel AwqTorchLinear")
    assert_verified(plain)
    torch.testing.assert_close(fast.logits(TOKENS), plain.logits(TOKENS), rtol=0.1, atol=0.25)
    with pytest.raises(ConfigError, match="computes in bfloat16 or float16, not in float32"):
        load(checkpoint, compute_dtype="float32")
    with pytest.raises(ConfigError, match="kernel 'marlin' cannot be used on cpu: it needs a GPU"):
        load(checkpoint, kernel="marlin")


def test_a_checkpoint_that_is_made(folder, tmp_path, capfd):
    """Skipped modules, no zero points; the process stays as it was; no traces in the files."""
    model = tiny_model("llama", folder)
    before = snapshot()
    capfd.readouterr()
    out = quantize(model, tmp_path / "out", zero_point=False, group_size=32, skip=("layers.0", "k_proj"))
    assert capfd.readouterr() == ("", "")
    assert not differences(before, snapshot())
    assert "/tmp" not in (out / "config.json").read_text()
    loaded = load(out)
    assert_verified(loaded)
    assert not loaded.notes
    quantized = {layer.name for layer in loaded.layers if layer.quantized}
    attention = {f"model.layers.1.self_attn.{name}_proj.weight" for name in ("q", "v", "o")}
    assert quantized == attention | {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert (loaded.config.zero_point, loaded.config.group_size) == (False, 32)
    with pytest.raises(CheckpointConflict, match="zero_point: requested True, stored False"):
        load(out, zero_point=True)


def test_a_failure_of_the_library_is_an_error_and_not_the_end_of_the_process(folder, tmp_path, monkeypatch):
    """gptqmodel ends the process that it runs in when one of its threads fails: float32 weights are such a case."""
    from polyquant_gptqmodel import _quantize

    monkeypatch.setattr(_quantize, "_dtype", lambda source, config: "float32")
    with pytest.raises(SaveError, match=r"_worker ended with code 1:[\s\S]*actual dtype = `torch\.float32`"):
        quantize(tiny_model("llama", folder), tmp_path / "out", group_size=64)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("variant", [{}, {"group_size": 16}], ids=["aten", "torch"])
def test_adapters_get_the_gradients_of_the_dequantized_model(folder, tmp_path, packing, variant):
    path = packing.write_awq(tiny_model("qwen2", folder), tmp_path / "out", **variant)
    packing.assert_adapters_train_as_on(packing.equal_dense(path), load(path))
