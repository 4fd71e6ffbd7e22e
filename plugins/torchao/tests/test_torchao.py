"""torchao on small random models: options, group sizes, skipped modules, checkpoints, training."""

import json

import polyquant
import pytest
import torch
from polyquant.errors import CheckpointConflict, ConfigError, ModelError, UnsupportedOperation
from polyquant.testing.checkpoints import adapter_gradients, assert_verified
from polyquant.testing.models import tiny_model
from polyquant_torchao._library import quantize_config
from torchao.utils import TorchAOBaseTensor
from transformers import LlamaForCausalLM

TOKENS = [3, 4, 5, 6, 7, 8, 9]
PRESETS = polyquant.backend("torchao").info.presets
ROWWISE = {name: options for name, options in PRESETS.items() if name != "int4"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def load(path, **options):
    return polyquant.load(path, "torchao", device="cpu", **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "int3"}, "weights must be 'int8', 'int4' or 'float8', got 'int3'"),
        ({"weights": "int4", "dynamic_activations": True}, "applies to weights='int8' only"),
        ({"group_size": 32}, "group_size applies to weights='int4' only"),
        ({"weights": "int4", "group_size": 0}, "group_size must be"),
        ({"quant_type": "Int8WeightOnlyConfig()"}, "unknown option 'quant_type'"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        load("nowhere", **options)


@pytest.mark.parametrize("model", ["qwen2", "llama-tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", PRESETS)
def test_bytes_and_checkpoint(folder, tmp_path, preset, dtype, model):
    loaded = load(tiny_model(model, folder), compute_dtype=dtype, **PRESETS[preset])
    assert_verified(loaded)
    loaded.save(tmp_path / "out")
    again = polyquant.load(tmp_path / "out", device="cpu")
    assert again.config.compute_dtype == dtype
    assert_verified(again)
    assert torch.equal(loaded.logits(TOKENS), again.logits(TOKENS))
    again.save(tmp_path / "second")
    assert (
        json.loads((tmp_path / "second" / "config.json").read_text())["quantization_config"]["compute_dtype"] == dtype
    )
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    with pytest.raises(CheckpointConflict, match=f"quantized for {dtype}.*use compute_dtype='{dtype}'"):
        load(tmp_path / "out", compute_dtype=other)


@pytest.mark.parametrize("preset", ROWWISE)
def test_odd_sizes(folder, preset):
    assert_verified(load(tiny_model("odd", folder), **ROWWISE[preset]))


def test_a_group_size_that_does_not_divide_names_the_layer(folder):
    odd = tiny_model("odd", folder)
    with pytest.raises(
        ConfigError, match=r"32 does not divide in_features 90 in model\.layers\.0\.self_attn\.q_proj\.weight"
    ):
        load(odd, weights="int4")
    assert_verified(load(odd, weights="int4", group_size=15, skip=("down_proj",)))


def test_int4_says_that_it_is_stored_in_int8(folder):
    loaded = load(tiny_model("llama", folder), weights="int4")
    layer = next(layer for layer in loaded.layers if layer.quantized)
    assert (layer.scheme, layer.bits) == ("int4-in-int8", 8)
    assert any("stored in int8" in note for note in loaded.notes)


def test_skip(folder):
    path, head = tiny_model("llama", folder), {"lm_head.weight"}
    down = {f"model.layers.{index}.mlp.down_proj.weight" for index in range(2)}

    def dense(**options):
        loaded = load(path, **options)
        assert_verified(loaded)
        return {layer.name for layer in loaded.layers if layer.role in ("linear", "head") and not layer.quantized}

    assert dense() == head
    assert dense(skip=("down_proj",)) == head | down
    assert dense(skip=("down_proj",), skip_defaults=False) == down
    assert dense(skip_defaults=False) == set()


def test_a_checkpoint_of_another_torchao_config_is_refused(folder, tmp_path):
    load(tiny_model("llama", folder)).save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["quant_type"]["default"]["_type"] = "Int4WeightOnlyConfig"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="its torchao config is Int4WeightOnlyConfig"):
        polyquant.load(tmp_path / "out", device="cpu")


def test_the_settings_of_torch_compile_stay():
    from torch._inductor import config

    before = (config.coordinate_descent_tuning, config.force_fuse_int_mm_with_mul, torch.get_float32_matmul_precision())
    for options in PRESETS.values():
        model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        from torchao.quantization import quantize_

        quantize_(model, quantize_config(polyquant.backend("torchao").config(options)).quant_type)
    assert before == (
        config.coordinate_descent_tuning, config.force_fuse_int_mm_with_mul, torch.get_float32_matmul_precision()
    )  # fmt: skip


def test_training_with_quantized_activations_is_refused(folder):
    loaded = load(tiny_model("llama", folder), dynamic_activations=True)
    with pytest.raises(UnsupportedOperation, match="no gradient passes through dynamic_activations"):
        loaded.backend.prepare_for_training(loaded)


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != "int8-dynamic"])
def test_adapters_get_the_gradients_of_the_dequantized_model(folder, preset):
    path = tiny_model("llama", folder)
    loaded = load(path, **PRESETS[preset])
    dense = LlamaForCausalLM.from_pretrained(path)
    for name, module in loaded.model.named_modules():
        if isinstance(getattr(module, "weight", None), TorchAOBaseTensor):
            dense.get_submodule(name).weight.data = module.weight.dequantize().detach()

    expected = adapter_gradients(dense, TOKENS)
    found = adapter_gradients(loaded.backend.prepare_for_training(loaded), TOKENS)
    assert found.keys() == {name for name in expected if "lora" in name}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)


def test_a_packed_head_is_not_tied_whatever_the_config_says(tmp_path):
    loaded = polyquant.load(tiny_model("llama", tmp_path), "torchao", device="cpu", skip_defaults=False)
    out, tokens = loaded.save(tmp_path / "out"), [5, 6, 7]
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    again = polyquant.load(out, device="cpu")
    assert torch.equal(again.logits(tokens), loaded.logits(tokens))
    assert next(layer for layer in again.layers if layer.name == "lm_head.weight").quantized
