"""Checkpoints and models that are not read: damaged, of other configs, dense, unusual."""

from functools import partial
import polyquant
import pytest
import torch
from polyquant.errors import CheckpointConflict, ConfigError, ModelError
from polyquant.measure.quality.divergence import kl_divergence
from polyquant.testing.checkpoints import assert_verified, changed_copy, replaced, without
from polyquant.testing.models import tiny_model
from safetensors.torch import load_file, save_file
from .checkpoints import make

from .conftest import LAYER, TOKENS, load, logits, theirs

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture
def changed(checkpoint, tmp_path):
    """The checkpoint with its tensors and its quantization_config changed by functions."""
    return partial(changed_copy, checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (without(f"{LAYER}.weight"), f"{LAYER} cannot be read: weight is missing; it has weight_scale"),
        (without(f"{LAYER}.weight_scale"), f"{LAYER} cannot be read: weight_scale is missing; it has weight"),
        (
            without("model.layers.0.self_attn.q_proj.bias"),
            "q_proj cannot be read: bias is missing; it has weight, weight_scale",
        ),
        (without("lm_head.weight"), r"lm_head\.weight of the model is not in the checkpoint"),
        (
            replaced(f"{LAYER}.weight", lambda weight: weight[:-1]),
            rf"{LAYER} cannot be read: weight of a layer \(512, 256\) should be \(128, 256\) uint8, and is \(127, 256\)",
        ),
        (replaced(f"{LAYER}.weight", lambda weight: weight.float()), r"and is \(128, 256\) float32"),
        (
            replaced(f"{LAYER}.weight", lambda weight: weight | 3),
            f"{LAYER} cannot be read: it has weights that are none of -1, 0 and 1",
        ),
        (
            replaced(f"{LAYER}.weight_scale", lambda scale: -scale),
            f"{LAYER} cannot be read: its weight_scale should be positive",
        ),
        (
            replaced(f"{LAYER}.weight_scale", lambda scale: scale * float("nan")),
            "weight_scale of a layer .* holds NaN or infinity",
        ),
        (
            replaced(f"{LAYER}.weight_scale", lambda scale: scale.repeat(2)),
            r"weight_scale of a layer .* should be \(1,\) float, and is \(2,\) float32",
        ),
        (
            replaced("model.layers.0.self_attn.q_proj.bias", lambda bias: bias[:-1]),
            r"q_proj cannot be read: bias of a layer \(256, 256\) should be \(256,\) float, and is \(255,\) float32",
        ),
    ],
)
def test_damaged_checkpoints_name_the_layer(changed, tensors, words):
    with pytest.raises(ModelError, match=words):
        load(changed(tensors))


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (lambda stored: stored.update(quantization_mode="dynamic"), r"Invalid enum value 'dynamic'.*quantization_mode"),
        (lambda stored: stored.update(linear_class="bitlinear", quantization_mode="online"), "'online' goes with"),
        (
            lambda stored: stored.update(quantization_mode="online"),
            "q_proj cannot be read: weight_scale has no place beside bias, weight",
        ),
        (lambda stored: stored.update(linear_class="hbitlinear"), r"Invalid enum value 'hbitlinear'"),
        (lambda stored: stored.update(base_bits=4), "it has base_bits, which is not read"),
        (
            lambda stored: stored.update(use_rms_norm=True),
            r"rms_norm\.weight is missing; it has bias, weight, weight_scale",
        ),
    ],
)
def test_configs_that_do_not_fit_the_tensors(changed, stored, words):
    with pytest.raises(ModelError, match=words):
        load(changed(stored=stored))


@pytest.mark.parametrize("listed", ["mlp.up_proj", "model.layers.1", LAYER])
def test_listed_modules_are_dense(folder, changed, listed):
    """A name in the list may be the start or the end of a module's, as transformers reads it."""
    dense = load_file(tiny_model("qwen2", folder) / "model.safetensors")
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in (0, 1)] if listed == "mlp.up_proj" else [LAYER]
    if listed == "model.layers.1":
        names = [name[:-7] for name in dense if name.startswith(f"{listed}.") and dense[name].dim() == 2]

    def dequantized(tensors):
        for name in names:
            del tensors[f"{name}.weight_scale"]
            tensors[f"{name}.weight"] = dense[f"{name}.weight"]

    path = changed(dequantized, lambda stored: stored.update(modules_to_not_convert=["lm_head", listed]))
    loaded = load(path)
    assert_verified(loaded)
    found = {layer.name for layer in loaded.layers if layer.reason == "skipped on request" and layer.role == "linear"}
    assert found == {f"{name}.weight" for name in names}
    assert kl_divergence(logits(theirs(path)), loaded.logits(TOKENS)).max() < 1e-3


def test_tensors_that_transformers_leaves_out_too(changed, checkpoint):
    """Older checkpoints have the rotary frequencies, which follow from the config."""
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)}
    assert torch.equal(load(changed(lambda found: found.update(extra))).logits(TOKENS), load(checkpoint).logits(TOKENS))


def test_a_dense_model_is_refused_without_advice_that_leads_back_here(folder, tmp_path):
    dense = tiny_model("llama", folder)
    for attempt in (lambda: load(dense), lambda: polyquant.quantize(dense, "bitnet", tmp_path / "out")):
        with pytest.raises(CheckpointConflict, match=r"is dense, and bitnet loads .* only \(bitnet\); it makes none"):
            attempt()


def test_another_method_and_contradictions_are_refused(changed, checkpoint):
    with pytest.raises(CheckpointConflict, match="requested 'bitlinear', stored 'autobitlinear'"):
        load(checkpoint, linear_class="bitlinear")
    with pytest.raises(CheckpointConflict, match="quantized already with 'gptq'"):
        load(changed(stored=lambda stored: stored.update(quant_method="gptq")))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("odd", r"layers\.0\.self_attn\.q_proj has 90 output rows, which cannot be packed four in a byte"),
        ("mixtral", r"layers\.0\.mlp\.experts\.gate_up_proj holds the experts of a layer in one tensor"),
    ],
)
def test_unusual_models_are_refused_before_weights_are_read(folder, tmp_path, name, words):
    checkpoint = make(tiny_model(name, folder), tmp_path / "out")
    save_file({"nothing": torch.zeros(1)}, checkpoint / "model.safetensors")
    with pytest.raises(ConfigError, match=words):
        load(checkpoint)
