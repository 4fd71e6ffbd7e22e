"""Checkpoints and models that are not read: damaged, of other configs or methods, with experts."""

from functools import partial
import pytest
import torch
from polyquant.errors import CheckpointConflict, ConfigError, ModelError
from polyquant.testing.checkpoints import assert_verified, changed_copy, replaced, without
from polyquant.testing.models import tiny_model
from safetensors.torch import load_file, save_file

from .conftest import LAYER, TOKENS, load


CODES, SCALES = f"{LAYER}.quantized_weight_values", f"{LAYER}.quantized_weight_scale_factors"


AMAX, METADATA = f"{LAYER}.quantized_weight_amax", f"{LAYER}.quantized_weight_metadata"


@pytest.fixture
def changed(checkpoint, tmp_path):
    """The checkpoint with its tensors and its quantization_config changed by functions."""
    return partial(changed_copy, checkpoint, tmp_path)


def test_a_layer_that_the_checkpoint_holds_dense_is_said(folder, changed):
    def dense(tensors):
        for name in (CODES, SCALES, AMAX, METADATA):
            del tensors[name]
        tensors[f"{LAYER}.weight"] = load_file(tiny_model("qwen2", folder) / "model.safetensors")[f"{LAYER}.weight"]

    loaded = load(changed(dense))
    assert any(LAYER in note and "dense in the checkpoint" in note for note in loaded.notes)
    layer = next(layer for layer in loaded.layers if layer.name == f"{LAYER}.weight")
    assert (layer.quantized, layer.reason) == (False, "skipped on request")
    assert_verified(loaded)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (without(SCALES), f"{LAYER} cannot be read: quantized_weight_scale_factors is missing; it has"),
        (without(CODES), f"{SCALES}.*have no place|have no place in the model: {LAYER}"),
        (without("model.layers.0.self_attn.q_proj.bias"), "q_proj cannot be read: bias is missing; it has "),
        (without("model.norm.weight"), r"model\.norm\.weight of the model is not in the checkpoint"),
        (replaced(CODES, lambda codes: codes[:-1]), r"should be \(512, 128\) uint8, and is \(511, 128\) uint8"),
        (replaced(CODES, lambda codes: codes.int()), r"should be \(512, 128\) uint8, and is \(512, 128\) int32"),
        (
            replaced(SCALES, lambda scales: scales.view(torch.uint8)[:9].clone()),
            r"should be \(8192,\) float8_e4m3fn, and is \(9,\) uint8",
        ),
        (replaced(SCALES, lambda scales: torch.full((8192,), float("nan")).to(scales.dtype)), f"{LAYER} .* NaN or inf"),
        (
            replaced(AMAX, lambda amax: amax / 0),
            f"{LAYER} cannot be read: quantized_weight_amax .* holds NaN or infinity",
        ),
        (replaced(METADATA, lambda numbers: numbers - 1), r"should be \[512, 256, 512, 256, 1, 1\], and is \[511, "),
        (
            lambda tensors: tensors.update({f"model.extra.{CODES.rpartition('.')[2]}": torch.ones(1, 1)}),
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
            {"dtype": "mxfp4", "scale_rule": "static_6"},
            r"_scale_factors .* should be \(2048,\) float8_e8m0fnu, and is \(4096,\) float8_e4m3fn",
        ),
        ({"dtype": "nvfp6_e2m3"}, "cannot read its quantization_config: .*nvfp6_e2m3"),
        ({"weight_scale_rule": "static_6"}, "its weight_scale_rule is 'static_6', which is not read"),
        ({"activation_dtype": "mxfp4"}, "its activation_dtype is 'mxfp4', which is not read"),
        ({"keep_master_weights": True}, "its keep_master_weights is True, which is not read"),
        ({"module_config_overrides": {"a": {}}}, "its module_config_overrides is .*, which is not read"),
        ({"rotation": 1}, "its rotation is 1, which is not read"),
    ],
)
def test_configs_that_are_not_read(changed, stored, words):
    with pytest.raises(ModelError, match=words):
        load(changed(stored=lambda found: found.update(stored)))


def test_settings_that_repeat_another_are_read(checkpoint, changed):
    same = {
        "weight_scale_rule": "mse",
        "activation_dtype": "nvfp4",
        "module_config_overrides": None,
        "skip_defaults": None,
    }
    path = changed(stored=lambda found: found.update(same, matmul_backend="cutlass"))
    assert torch.equal(load(path).logits(TOKENS), load(checkpoint).logits(TOKENS))


def test_another_method_and_contradictions_are_refused(changed, checkpoint):
    with pytest.raises(CheckpointConflict, match="requested 'static_6', stored 'mse'"):
        load(checkpoint, scale_rule="static_6")
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
    assert all(layer.quantized for layer in packed.layers if layer.role == "experts")
    saved = packed.save(tmp_path / "saved")
    assert torch.equal(load(saved, kernel="packed").logits(TOKENS), packed.logits(TOKENS))
    assert not any(layer.quantized for layer in load(saved).layers if layer.role == "experts")


def test_damaged_dense_models_are_refused_by_name(folder, tmp_path):
    for file in tiny_model("llama", folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{LAYER}.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{LAYER} cannot be quantized: it holds NaN or infinity"):
        load(tmp_path)
