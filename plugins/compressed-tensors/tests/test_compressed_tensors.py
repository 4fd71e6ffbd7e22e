"""compressed-tensors on small random models: schemes, checkpoints of other tools, damage, calibration, training, quiet."""

import polyquant
import pytest
import torch
from polyquant.errors import CheckpointConflict, ConfigError, ModelError, UnsupportedOperation
from polyquant.memory.storage import stored_bytes
from polyquant.testing.checkpoints import adapter_gradients, assert_verified, changed_copy
from polyquant.testing.models import tiny_model
from polyquant_compressed_tensors._layers import CompressedLinear
from transformers import AutoModelForCausalLM

from .conftest import load


TOKENS = [3, 4, 5, 6, 7, 8, 9]


UP = "model.layers.1.mlp.up_proj"


SCHEMES = {
    "int4-asymmetric": ({"symmetric": False, "group_size": 32}, "decode and torch matmul"),
    "int4-channel": ({"strategy": "channel"}, "decode and torch matmul"),
    "int8-asymmetric": ({"weights": "int8", "symmetric": False}, "decode and torch matmul"),
    "int8-dynamic": ({"weights": "int8", "dynamic_activations": True}, "activations rounded, decode"),
    "fp8-dynamic": ({"weights": "fp8", "dynamic_activations": True}, "activations rounded, decode"),
    "fp8-block": ({"weights": "fp8", "strategy": "block", "dynamic_activations": True}, "activations rounded"),
    "fp8-tensor": ({"weights": "fp8", "strategy": "tensor"}, "decode and torch matmul"),
    "mxfp8": ({"weights": "mxfp8"}, "decode and torch matmul"),
    "mxfp8-dynamic": ({"weights": "mxfp8", "dynamic_activations": True}, "activations rounded"),
    "mxfp4": ({"weights": "mxfp4"}, "decode and torch matmul"),
    "mxfp4-dynamic": ({"weights": "mxfp4", "dynamic_activations": True}, "activations rounded"),
    "nvfp4-dynamic": ({"weights": "nvfp4", "dynamic_activations": True}, "activations rounded"),
    "fp8-static": ({"weights": "fp8", "strategy": "tensor", "static_activations": True}, "activations rounded"),
    "int8-static": ({"weights": "int8", "static_activations": True}, "activations rounded"),
    "nvfp4": ({"weights": "nvfp4"}, "decode and torch matmul"),
}


@pytest.fixture
def changed(checkpoint, tmp_path):
    """A copy of a checkpoint with another quantization_config or other tensors."""

    def make(*, config=None, tensors=None, **options):
        return changed_copy(checkpoint(**options), tmp_path / "changed", tensors, config)

    return make


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"weights": "int3"},
            "weights must be 'int4', 'int8', 'fp8', 'mxfp8', 'mxfp4', 'nvfp4' or 'sparse', got 'int3'",
        ),
        ({"scheme": "W4A16"}, "compressed-tensors has nothing with scheme=W4A16; .*schemes int4, int8"),
        ({"weights": "mxfp4", "group_size": 64}, "group_size 64 does not apply: mxfp4 has groups of 32"),
        ({"strategy": "channel", "group_size": 64}, "with strategy 'channel' has no groups"),
        ({"strategy": "block"}, "strategy 'block' does not go with int4; use group, channel"),
        ({"weights": "fp8", "symmetric": False}, "fp8 has no zero point"),
        ({"dynamic_activations": True}, "dynamic_activations applies to symmetric int8, fp8, mxfp8"),
        ({"weights": "mxfp4", "static_activations": True}, "static_activations applies to symmetric int8 and fp8"),
        ({"weights": "fp8", "static_activations": True, "dynamic_activations": True}, "exclude each other"),
        ({"samples": 4}, "samples applies to method='gptq' and calibrated activations only; 'rtn' uses no"),
        ({"weights": "fp8", "method": "gptq"}, "method 'gptq' applies to int4 and int8 only"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        polyquant.load("nowhere", "compressed-tensors", **options)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_stays_packed_and_is_saved_exactly(checkpoint, tmp_path, name):
    options, kernel = SCHEMES[name]
    loaded = load(checkpoint(**options))
    assert_verified(loaded)
    assert loaded.kernel.startswith(kernel)
    assert {field: getattr(loaded.config, field) for field in options} == options
    loaded.save(tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.config == loaded.config
    assert torch.equal(loaded.logits(TOKENS), again.logits(TOKENS))


SAME = {"int4": ({}, ""), "int8": ({"weights": "int8"}, ""), "fp8": ({"weights": "fp8"}, "")} | SCHEMES


@pytest.mark.parametrize("name", [name for name in SAME if "asymmetric" not in name])  # those transformers cannot load
def test_transformers_decompresses_in_the_first_forward_pass_and_gives_the_same_logits(checkpoint, name):
    path = checkpoint(**SAME[name][0])
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    before = stored_bytes(theirs)
    with torch.inference_mode():
        expected = theirs(torch.tensor([TOKENS]), use_cache=False).logits[0].float()
    assert stored_bytes(theirs) > 1.5 * before
    ours = load(path, backend="compressed-tensors", kernel="decode")
    packed = stored_bytes(ours.model)
    assert torch.equal(ours.logits(TOKENS), expected)
    assert stored_bytes(ours.model) == packed


def test_odd_sizes(checkpoint, folder):
    assert_verified(load(checkpoint("odd", strategy="channel")))
    with pytest.raises(
        ConfigError,
        match=r"64 do not divide in_features 90 in model\.layers\.0\.self_attn\.q_proj\.weight \(90, 90\); use strategy",
    ):
        checkpoint("odd")


def test_fused_experts_are_refused_by_name(checkpoint):
    with pytest.raises(ConfigError, match=r"mlp\.experts\.\w+ "):
        checkpoint("mixtral")


def test_skip(checkpoint):
    def dense(**options):
        loaded = load(checkpoint(**options))
        assert_verified(loaded)
        return {
            layer.name: layer.reason
            for layer in loaded.layers
            if layer.role in ("linear", "head") and not layer.quantized
        }

    head = {"lm_head.weight": "the output head stays dense by default"}
    down = {f"model.layers.{index}.mlp.down_proj.weight": "skipped on request" for index in range(2)}
    assert dense() == head
    assert dense(skip=("down_proj",)) == head | down
    assert dense(weights="int8", skip_defaults=False) == {}


def test_stored_options_are_held_against_requested_ones(checkpoint):
    path = checkpoint()
    with pytest.raises(CheckpointConflict, match="group_size: requested 32, stored 64"):
        load(path, backend="compressed-tensors", group_size=32)
    with pytest.raises(CheckpointConflict, match="method: requested 'gptq', stored 'rtn'"):
        load(path, backend="compressed-tensors", method="gptq")
    assert load(path, backend="compressed-tensors", kernel="decode").kernel == "decode and torch matmul"
    with pytest.raises(ConfigError, match="here it is int4 in float32 on cpu"):
        load(path, backend="compressed-tensors", kernel="pack_mm", compute_dtype="float32")


def group(config):
    return config["config_groups"]["group_0"]


def test_other_dialects(changed, checkpoint):
    """As other tools and older versions write it: no status, no strategy, patterns to ignore, no word of the method."""

    def rewrite(config):
        for name in ("polyquant", "quantization_status", "sparsity_config", "transform_config"):
            del config[name]
        config["ignore"] = ["re:.*lm_head"]
        config["format"] = group(config).pop("format")
        group(config)["weights"] = {"num_bits": 4, "type": "int", "group_size": 64, "symmetric": True}

    other, usual = load(changed(config=rewrite)), load(checkpoint())
    assert torch.equal(other.logits(TOKENS), usual.logits(TOKENS))
    assert other.config.method == "unknown"
    assert_verified(other)


def with_activations(**arguments):
    standard = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    return lambda config: group(config).update(input_activations={**standard, **arguments})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(kv_cache_scheme={"num_bits": 8}), r"quantizes the key-value cache \(kv_cache_scheme\)"),
        (lambda c: c.update(transform_config={"config_groups": {}}), "rotates activations"),
        (lambda c: c.update(sparsity_config={"format": "sparse-bitmask"}), "its weights are sparse"),
        (lambda c: c["config_groups"].update(group_1=group(c)), r"several of its config_groups \(group_0, group_1\) target 'Lin"),
        (lambda c: c.update(config_groups=[]), "has no config_groups"),
        (lambda c: c.update(config_groups=["W4A16"]), "no mapping"),
        (lambda c: group(c).update(targets=["re:.*q_proj"]), "k_proj cannot be read: it is packed, and no config group"),
        (lambda c: group(c).update(targets=["Conv1d", "Linear"]), "its group_0 targets Conv1d; 'Linear', names of modules"),
        (lambda c: group(c).update(targets=[]), "its group_0 has no targets"),
        (lambda c: group(c).update(targets=["re:("]), "in its group_0's targets is no regular expression"),
        (lambda c: group(c).update(format="marlin-24"), "int of 4 bits in format 'marlin-24'; read are"),
        (lambda c: group(c)["weights"].update(num_bits=3), "int of 3 bits in format 'pack-quantized'"),
        (lambda c: group(c)["weights"].update(actorder="group"), "orders weights by activation"),
        (lambda c: group(c)["weights"].update(dynamic=True), "weights are quantized dynamically"),
        (lambda c: group(c).update(output_activations={"num_bits": 8}), "output activations"),
        (with_activations(dynamic=False, strategy="tensor"), r"activations to int8 \(tensor, dynamic False\) for int4 weights"),
        (with_activations(symmetric=False), "with a zero point.* beside these none is run"),
        (lambda c: c.update(ignore=["re:("]), "is no regular expression"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused(changed, change, words):
    with pytest.raises(ModelError, match=words):
        load(changed(config=change))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop(f"{UP}.weight_scale"), f"{UP} cannot be read: weight_scale is missing"),
        (lambda t: t.pop(f"{UP}.weight_packed"), f"{UP} cannot be read: weight_packed is missing"),
        (lambda t: t.update({f"{UP}.weight_packed": t[f"{UP}.weight_packed"][:, :-1].contiguous()}),
         r"weight_packed of a layer \(512, 256\) should be \(512, 32\) int32, and is \(512, 31\) int32"),
        (lambda t: t.update({f"{UP}.weight_scale": t[f"{UP}.weight_scale"][:, :2].contiguous()}),
         r"weight_scale of a layer \(512, 256\) should be \(512, 4\) float"),
        (lambda t: t.update({f"{UP}.weight_packed": t[f"{UP}.weight_packed"].long()}), "and is .* int64"),
        (lambda t: t.update({f"{UP}.weight_shape": torch.tensor([512, 255])}), r"weight_shape says \[512, 255\]"),
        (lambda t: t.update({f"{UP}.weight_g_idx": torch.zeros(256)}), f"{UP} cannot be read: weight_g_idx has no place"),
        (lambda t: t.pop("lm_head.weight"), r"lm_head\.weight of the model is not in the checkpoint"),
        (lambda t: t.update({"lm_head.weight_packed": torch.zeros(1)}), r"lm_head cannot be read: weight_scale, weight_shape is missing; it has weight, weight_packed"),
    ],
)  # fmt: skip
def test_damaged_checkpoints_name_the_tensor(changed, damage, words):
    with pytest.raises(ModelError, match=words):
        load(changed(tensors=damage))


@pytest.mark.parametrize("weights", ["int8", "nvfp4"])
def test_adapters_train_through_rounded_activations(checkpoint, weights):
    loaded = load(checkpoint(weights=weights, dynamic_activations=True), compute_dtype="float32", kernel="library")
    assert any(map(torch.any, adapter_gradients(loaded.backend.prepare_for_training(loaded), TOKENS).values()))


def test_a_model_that_rounds_activations_is_not_made_dense(checkpoint):
    loaded = load(checkpoint(weights="int8", dynamic_activations=True), kernel="library")
    with pytest.raises(UnsupportedOperation, match="more than a weight and a bias"):
        loaded.model.dequantize()


@pytest.mark.parametrize("options", [{}, {"weights": "int8"}, {"weights": "fp8"}, {"weights": "nvfp4"}])
def test_adapters_get_the_gradients_of_the_dequantized_model(checkpoint, folder, options):
    loaded = load(checkpoint("qwen2", compute_dtype="float32", **options), compute_dtype="float32")
    dense = AutoModelForCausalLM.from_pretrained(tiny_model("qwen2", folder / "dense"))
    for name, module in loaded.model.named_modules():
        if isinstance(module, CompressedLinear):
            dense.get_submodule(name).weight.data = module.dequantize()

    expected = adapter_gradients(dense, TOKENS)
    found = adapter_gradients(loaded.backend.prepare_for_training(loaded), TOKENS)
    assert found.keys() == {name for name in expected if "lora" in name}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)
