"""Packed checkpoints: which layers are quantized shows in their tensors."""

import json

import msgspec
import pytest
import torch
from polyquant.models import versions
from polyquant.models import hf
from polyquant.plugin import checkpoints, dense_linears
from polyquant.plugin.layers import layer_tensors
from polyquant.errors import ConfigError, ModelError
from polyquant.models.weights import list_weights
from polyquant.models.resolve import resolve
from polyquant.options import BackendOptions
from polyquant.testing.models import tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return resolve(tiny_model("llama", tmp_path_factory.mktemp("models")))


def test_the_tensors_say_what_is_dense(source):
    weights = list_weights(hf.skeleton(source, "float32"))
    linears = {weight.name.rpartition(".")[0] for weight in weights if weight.role == "linear"}
    usual = BackendOptions()
    assert checkpoints.with_stored_skips(usual, weights, linears, source) == (usual, [])
    down = {name for name in linears if name.endswith("down_proj")}
    config, notes = checkpoints.with_stored_skips(usual, weights, linears - down, source)
    assert set(config.skip) == down | {"lm_head"} and not config.skip_defaults
    assert notes == [f"3 layers are dense in the checkpoint: {', '.join(config.skip)}"]
    config, notes = checkpoints.with_stored_skips(usual, weights, linears | {"lm_head"}, source)
    assert (config.skip, config.skip_defaults, notes) == ((), False, [])
    with pytest.raises(ModelError, match="2 packed layers have no Linear module in the model: a, b"):
        checkpoints.with_stored_skips(usual, weights, linears | {"b", "a"}, source)
    with pytest.raises(ModelError, match="says that it is quantized, and no tensor in it is"):
        checkpoints.with_stored_skips(usual, weights, set(), source)


def test_packed_modules_are_found_by_their_tensors(source):
    assert checkpoints.packed_modules(source, ("qweight",)) == set()
    assert "model.layers.1.mlp.up_proj" in checkpoints.packed_modules(source, ("qweight", "weight"))


@pytest.mark.skipif(not versions.VERSION_5, reason="before transformers 5 experts are Linear modules, and quantized")
def test_fused_experts_are_refused_unless_skipped(tmp_path):
    weights = list_weights(hf.skeleton(resolve(tiny_model("mixtral", tmp_path)), "float32"))
    with pytest.raises(ConfigError, match=r"experts\.gate_up_proj is no Linear module but MixtralExperts"):
        checkpoints.require_linears(weights, BackendOptions())
    experts = tuple(weight.name.rpartition(".")[0] for weight in weights if weight.role == "experts")
    checkpoints.require_linears(weights, msgspec.structs.replace(BackendOptions(), skip=experts))


def test_a_library_s_checkpoint_is_completed(source, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4}}))
    checkpoints.complete(tmp_path, source, ["lm_head"], hf.load_tokenizer(source))
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored == {"bits": 4, "skip_modules": ["lm_head"]}
    assert (tmp_path / "generation_config.json").exists() and (tmp_path / "tokenizer.json").exists()


EXPECTED = {"codes": ((8, 2), "uint8"), "scale": ((8, 1), "float"), "whole": ((), "float32")}


def stored():
    return {
        "codes": torch.arange(16, dtype=torch.uint8).view(8, 2), "scale": torch.ones(8).bfloat16(),
        "whole": torch.ones(1, 1), "bias": torch.zeros(8),
    }  # fmt: skip


def test_tensors_of_a_layer_in_the_shapes_that_are_expected():
    """Axes of length 1 are no matter, and any floating point is, where that is what is expected."""
    found = layer_tensors(torch.nn.Linear(4, 8), stored(), EXPECTED)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "codes": (8, 2), "scale": (8, 1), "whole": (), "bias": (8,),
    }  # fmt: skip
    assert torch.equal(found["codes"], stored()["codes"]) and found["scale"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scale": None, "codes": None}, "^codes, scale is missing; it has bias, whole$"),
        ({"bias": None}, "^bias is missing; it has codes, scale, whole$"),
        ({"g_idx": torch.zeros(4)}, "^g_idx has no place beside bias, codes, scale, whole$"),
        ({"codes": torch.zeros(2, 8, dtype=torch.uint8)},
         r"^codes of a layer \(8, 4\) should be \(8, 2\) uint8, and is \(2, 8\) uint8$"),
        ({"codes": torch.zeros(8, 2)}, r"and is \(8, 2\) float32$"),
        ({"scale": torch.zeros(8, dtype=torch.int8)}, r"^scale .* should be \(8, 1\) float, and is \(8,\) int8$"),
        ({"whole": torch.zeros(()).half()}, r"^whole .* should be \(\) float32, and is \(\) float16$"),
        ({"bias": torch.zeros(4)}, r"^bias .* should be \(8,\) float, and is \(4,\) float32$"),
    ],
)  # fmt: skip
def test_tensors_of_a_layer_that_do_not_fit_are_named(change, words):
    tensors = {name: tensor for name, tensor in {**stored(), **change}.items() if tensor is not None}
    with pytest.raises(ModelError, match=words):
        layer_tensors(torch.nn.Linear(4, 8), tensors, EXPECTED)


def test_linear_modules_that_stay_dense(source):
    weights = list_weights(hf.skeleton(source, "float32"))
    assert dense_linears(weights, BackendOptions()) == ["lm_head"]
    skipping = BackendOptions(skip=("k_proj",)).with_full_names(weights)
    assert set(dense_linears(weights, skipping)) == {f"model.layers.{at}.self_attn.k_proj" for at in (0, 1)} | {
        "lm_head"
    }
