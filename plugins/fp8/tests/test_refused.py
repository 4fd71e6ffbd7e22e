"""Checkpoints and models that are not read: damaged, of other configs or methods, with experts."""

import json

import polyquant
import pytest
import torch
from polyquant.errors import CheckpointConflict, ConfigError, ModelError
from polyquant.testing.checkpoints import assert_verified, changed_copy, replaced, without
from polyquant.testing.models import tiny_model
from polyquant_fp8._decode import E4M3, quantize
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

from .conftest import LAYER, load

TOKENS = [3, 4, 5, 6, 7, 8, 9, 10]


def test_a_layer_that_the_checkpoint_holds_dense_is_said(folder, changed):
    def dense(tensors):
        del tensors[f"{LAYER}.weight_scale_inv"]
        tensors[f"{LAYER}.weight"] = load_file(tiny_model("qwen2", folder) / "model.safetensors")[f"{LAYER}.weight"]

    loaded = load(changed(dense))
    assert any(f"{LAYER}" in note and "dense in the checkpoint" in note for note in loaded.notes)
    layer = next(layer for layer in loaded.layers if layer.name == f"{LAYER}.weight")
    assert (layer.quantized, layer.reason) == (False, "skipped on request")
    assert_verified(loaded)


def with_nan(weight):
    codes = weight.view(torch.uint8).clone()
    codes[0, 0] = 0x7F
    return codes.view(E4M3)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (without(f"{LAYER}.weight_scale_inv"), f"{LAYER}.weight is torch.float8_e4m3fn, and has no weight_scale_inv"),
        (
            without(f"{LAYER}.weight"),
            f"{LAYER} cannot be read: weight is missing; it has weight_scale_inv",
        ),
        (
            without("model.layers.0.self_attn.q_proj.bias"),
            r"q_proj cannot be read: bias is missing; it has weight, weight_scale_inv",
        ),
        (without("model.norm.weight"), r"model\.norm\.weight of the model is not in the checkpoint"),
        (
            replaced(f"{LAYER}.weight", lambda weight: weight[:-1]),
            rf"{LAYER} cannot be read: weight of a layer .* should be \(512, 256\) float8_e4m3fn, and",
        ),
        (replaced(f"{LAYER}.weight", lambda weight: weight.bfloat16()), r"and is \(512, 256\) bfloat16"),
        (
            replaced(f"{LAYER}.weight", lambda weight: weight.float().to(torch.float8_e5m2)),
            r"and is \(512, 256\) float8_e5m2",
        ),
        (
            replaced(f"{LAYER}.weight_scale_inv", lambda scales: scales[:1]),
            rf"{LAYER} cannot be read: weight_scale_inv .* should be \(4, 2\) float, and is \(1, 2\) float32",
        ),
        (
            replaced(f"{LAYER}.weight_scale_inv", lambda scales: scales.to(torch.float8_e8m0fnu)),
            r"should be \(4, 2\) float, and is \(4, 2\) float8_e8m0fnu",
        ),
        (
            replaced(f"{LAYER}.weight_scale_inv", lambda scales: scales / 0),
            f"{LAYER} cannot be read: weight_scale_inv .* holds NaN or infinity",
        ),
        (replaced(f"{LAYER}.weight", with_nan), f"{LAYER} cannot be read: weight .* holds NaN or infinity"),
        (
            lambda tensors: tensors.update({f"{LAYER}.activation_scale": torch.tensor(1.0)}),
            "activation_scale has no place beside weight, weight_scale_inv",
        ),
        (
            lambda tensors: tensors.update({"model.extra.weight_scale_inv": torch.ones(1, 1)}),
            r"1 packed layers have no Linear module in the model: model\.extra",
        ),
    ],
)
def test_damaged_checkpoints_name_the_layer(changed, tensors, words):
    with pytest.raises(ModelError, match=words):
        load(changed(tensors))


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (
            lambda stored: stored.update(weight_block_size=[64, 64]),
            r"should be \(4, 4\) float, and is \(2, 2\) float32",
        ),
        (lambda stored: stored.update(weight_block_size=None), r"should be \(\) float, and is \(2, 2\) float32"),
        (lambda stored: stored.update(weight_block_size=[128]), r"its weight_block_size is \[128\]; two positive"),
        (lambda stored: stored.update(fmt="e5m2"), "its fmt is 'e5m2'; 'e4m3' or"),
        (lambda stored: stored.update(expert_dtype="fp6"), "its expert_dtype is 'fp6'; 'fp8' or 'fp4' is read"),
        (lambda stored: stored.update(modules_to_convert=["embed"]), "its modules_to_convert is"),
        (
            lambda stored: stored.update(scale_fmt="ue8m0"),
            r"should be \(2, 2\) float8_e8m0fnu, and is \(2, 2\) float32",
        ),
        (lambda stored: stored.update(rotation=1), "it has rotation, which is not read"),
        (lambda stored: stored.update(activation_scheme="static"), "activation_scale is missing"),
    ],
)
def test_configs_that_do_not_fit_the_tensors(changed, stored, words):
    with pytest.raises(ModelError, match=words):
        load(changed(stored=stored))


def test_another_method_and_contradictions_are_refused(changed, checkpoint):
    with pytest.raises(CheckpointConflict, match="requested 64, stored 128"):
        load(checkpoint, block_rows=64)
    with pytest.raises(CheckpointConflict, match="quantized already with 'gptq'"):
        load(changed(stored=lambda stored: stored.update(quant_method="gptq")))


def test_fused_experts_are_refused_or_left_dense_on_request(folder):
    path = tiny_model("mixtral", folder)
    with pytest.raises(
        ConfigError, match=r"experts\.gate_up_proj holds the experts .*kernel='packed'.* skip=\('experts',\)"
    ):
        load(path)
    loaded = load(path, skip=("experts",))
    reasons = {layer.reason for layer in loaded.layers if layer.role == "experts"}
    assert reasons == {"skipped on request"}
    assert any(layer.quantized for layer in loaded.layers)


def test_a_saved_model_with_packed_experts_has_dense_ones_in_its_file(folder, tmp_path):
    packed = load(tiny_model("mixtral", folder), kernel="packed")
    assert_verified(packed)
    assert all(layer.quantized for layer in packed.layers if layer.role == "experts")
    saved = packed.save(tmp_path / "saved")
    again, library = load(saved, kernel="packed"), load(saved)
    assert again.config == packed.config
    assert torch.equal(again.logits(TOKENS), packed.logits(TOKENS))
    assert not any(layer.quantized for layer in library.layers if layer.role == "experts")
    assert json.loads((again.save(tmp_path / "again") / "config.json").read_text()) == json.loads(
        (saved / "config.json").read_text()
    )
    stored = json.loads((saved / "config.json").read_text())["quantization_config"]
    with torch.device("meta"):  # what transformers makes of it on a GPU
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(saved))
    replace_with_fp8_linear(theirs, stored["modules_to_not_convert"], FineGrainedFP8Config(**stored))
    kinds = {name: type(module).__name__ for name, module in theirs.named_modules()}
    assert {layer.name.rpartition(".")[0] for layer in library.layers if layer.quantized} == {
        name for name, kind in kinds.items() if kind == "FP8Linear"
    }
    assert kinds["model.layers.0.mlp.experts"] == "MixtralExperts"


def test_fused_experts_that_are_fp8_in_a_checkpoint_are_not_read(folder, tmp_path):
    """As one tensor for all experts, which no writer that we know makes."""
    whole = load(tiny_model("mixtral", folder), skip=("experts",)).save(tmp_path / "dense-experts")

    def quantized(tensors):
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            each = [quantize(matrix, (128, 128)) for matrix in tensors[name]]
            tensors[name], tensors[f"{name}_scale_inv"] = (
                torch.stack(list(parts)) for parts in zip(*each, strict=True)
            )

    path = changed_copy(whole, tmp_path / "fused", quantized)
    with pytest.raises(ModelError, match=r"fused experts that are FP8 .*those in model\.layers\.0\.mlp\.experts\.gate"):
        polyquant.plan(path, "fp8", device="cpu")


def test_static_activations_come_from_a_checkpoint_only(folder):
    with pytest.raises(ConfigError, match="activation_scheme 'static' needs scales that a checkpoint brings"):
        load(tiny_model("llama", folder), activation_scheme="static")


def test_damaged_dense_models_are_refused_by_name(folder, tmp_path):
    for file in tiny_model("llama", folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{LAYER}.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{LAYER} cannot be quantized: it holds NaN or infinity"):
        load(tmp_path)
