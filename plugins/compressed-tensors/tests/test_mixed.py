"""Layers with formats of their own: several config groups, made here and elsewhere, as compressed-tensors reads them."""

import copy

import polyquant
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from polyquant.errors import ConfigError, ModelError
from polyquant.plugin import module_of
from polyquant.testing.checkpoints import assert_verified, changed_copy
from polyquant.testing.models import tiny_model
from polyquant_compressed_tensors._library import quantization_scheme
from polyquant_compressed_tensors.formats import NAMES, choices_of
from polyquant_compressed_tensors.options import CompressedTensorsOptions
from transformers import AutoConfig, AutoModelForCausalLM

from .conftest import load

TOKENS = [3, 4, 5, 6, 7, 8, 9]
MIXED = {
    "layers.1.mlp": "nvfp4", "down_proj": "int8", "layers.0.self_attn.q_proj": "fp8",
    "layers.1.self_attn": "int4-32-asymmetric", "layers.0.mlp.gate_proj": "fp8-block-dynamic", "o_proj": "mxfp4",
    "lm_head": "int8-64",
}  # fmt: skip
READ_BY_TRANSFORMERS = {name: chosen.removesuffix("-asymmetric") for name, chosen in MIXED.items()}


@pytest.fixture(scope="module")
def mixed(folder):
    out = folder / "mixed"
    return polyquant.quantize(tiny_model("llama", folder / "dense"), "compressed-tensors", out, device="cpu",
                              layers=MIXED)  # fmt: skip


def schemes(loaded):
    return {module_of(layer): layer.scheme for layer in loaded.layers if layer.quantized}


def test_a_checkpoint_is_planned_described_read_back_and_saved(folder, mixed, tmp_path):
    planned = polyquant.plan(folder / "dense" / "llama", "compressed-tensors", device="cpu", layers=MIXED)
    loaded = load(mixed)
    assert_verified(loaded)
    described = {layer.name: (layer.scheme, layer.bits, layer.stored_bytes) for layer in loaded.layers}
    for tensor in planned.tensors:
        if tensor.name in described:
            assert (tensor.scheme, tensor.bits, tensor.stored_bytes) == described[tensor.name], tensor.name
    assert planned.weights_planned_bytes == sum(nbytes for _, _, nbytes in described.values())
    head = load(mixed).config
    assert (head.weights, head.group_size, head.symmetric) == ("int4", 64, True)
    assert dict(head.layers) == {
        "model.layers.0.self_attn.q_proj": "fp8", "model.layers.0.self_attn.o_proj": "mxfp4",
        "model.layers.0.mlp.gate_proj": "fp8-block-dynamic", "model.layers.0.mlp.down_proj": "int8",
        "model.layers.1.self_attn.q_proj": "int4-32-asymmetric", "model.layers.1.self_attn.k_proj": "int4-32-asymmetric",
        "model.layers.1.self_attn.v_proj": "int4-32-asymmetric", "model.layers.1.self_attn.o_proj": "mxfp4",
        "model.layers.1.mlp.gate_proj": "nvfp4", "model.layers.1.mlp.up_proj": "nvfp4",
        "model.layers.1.mlp.down_proj": "int8", "lm_head": "int8-64",
    }  # fmt: skip
    assert schemes(loaded)["model.layers.0.self_attn.v_proj"] == "int4"
    again = load(loaded.save(tmp_path / "saved"))
    assert again.config == loaded.config
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))
    for kernel in ("packed", "decode"):
        other = load(mixed, kernel=kernel)
        assert_verified(other)
        assert schemes(other) == schemes(loaded)


def test_a_layer_is_what_it_is_in_a_checkpoint_of_its_format_alone(folder, mixed, checkpoint):
    loaded = load(mixed, kernel="decode", compute_dtype="float32")
    for name, chosen in loaded.config.layers:
        if name == "lm_head":
            continue
        alone = load(checkpoint(**choices_of(chosen)), kernel="decode", compute_dtype="float32")
        assert torch.equal(*(each.model.get_submodule(name).dequantize() for each in (loaded, alone))), name


def test_transformers_reads_it(folder, tmp_path):
    path = polyquant.quantize(
        tiny_model("llama", folder / "dense"), "compressed-tensors", tmp_path / "out", device="cpu",
        layers=READ_BY_TRANSFORMERS,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = theirs(torch.tensor([TOKENS]), use_cache=False).logits[0].float()
    assert torch.equal(load(path, kernel="decode").logits(TOKENS), expected)


def test_gptq_rounds_layers_to_their_own_integers(folder, tmp_path):
    loaded = load(polyquant.quantize(
        tiny_model("llama", folder / "dense"), "compressed-tensors", tmp_path / "out", device="cpu", method="gptq",
        samples=2, length=16, layers={"down_proj": "int8", "k_proj": "int4-32"},
    ))  # fmt: skip
    assert_verified(loaded)
    found = schemes(loaded)
    assert {name.rpartition(".")[2]: scheme for name, scheme in found.items()}["down_proj"] == "int8"
    assert set(found.values()) == {"int4", "int8"}
    assert loaded.config.method == "gptq"


def theirs(path, groups, ignore=("lm_head",)):
    """The scheme that compressed-tensors gives each Linear module of a model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    config = QuantizationConfig(config_groups=copy.deepcopy(groups), ignore=list(ignore))
    apply_quantization_config(model, config, show_progress=False)
    found = {}
    for name, module in model.named_modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is not None:
            weights = scheme.weights
            found[name] = f"{'int' if weights.type == 'int' else 'fp'}{weights.num_bits}"
    return found


@pytest.mark.parametrize(
    "targets",
    [
        (["Linear"], ["re:.*down_proj"], ["model.layers.0.mlp.down_proj"]),
        (["re:.*mlp.*"], ["re:.*self_attn.*"], ["model.layers.1.self_attn.o_proj"]),
        (["re:.*proj"], ["re:.*down_proj", "model.layers.0.mlp.up_proj"], ["re:model.layers.1.*"]),
        (["re:.*self_attn.*", "Linear"], ["re:.*q_proj"], ["re:.*layers.0.*"]),
    ],
    ids=str,
)
def test_targets_are_read_as_compressed_tensors_reads_them(folder, tmp_path, targets):
    """A checkpoint of another tool: patterns, several that fit a module, groups without the class."""
    dense = tiny_model("llama", folder / "dense")
    chosen = ("int4", "int8", "fp8")
    groups = {
        f"group_{number}": quantization_scheme(CompressedTensorsOptions(weights=weights), own)
        for number, (weights, own) in enumerate(zip(chosen, targets, strict=True))
    }
    expected = theirs(dense, groups)
    made = polyquant.quantize(dense, "compressed-tensors", tmp_path / "made", device="cpu", weights="int4",
                              layers=expected)  # fmt: skip

    def elsewhere(stored):
        stored["config_groups"] = {name: scheme.model_dump(mode="json") for name, scheme in groups.items()}
        del stored["polyquant"]

    path = changed_copy(made, tmp_path / "changed", stored=elsewhere)
    loaded = load(path)
    assert schemes(loaded) == expected
    assert_verified(loaded)
    assert torch.equal(loaded.logits(TOKENS), load(made).logits(TOKENS))
    again = load(loaded.save(tmp_path / "saved"))
    assert again.config == loaded.config


def test_layers_that_no_group_targets_are_dense(folder, tmp_path):
    dense = tiny_model("llama", folder / "dense")
    path = polyquant.quantize(dense, "compressed-tensors", tmp_path / "out", device="cpu", skip=("v_proj",),
                              layers={"mlp": "fp8"})  # fmt: skip

    def elsewhere(stored):
        stored["ignore"] = []
        for group in stored["config_groups"].values():
            if group["targets"] == ["Linear"]:
                group["targets"] = ["re:.*[qko]_proj"]

    loaded = load(changed_copy(path, tmp_path / "changed", stored=elsewhere))
    assert_verified(loaded)
    assert schemes(loaded) == schemes(load(path))
    assert "model.layers.0.self_attn.v_proj" in loaded.config.skip


def test_every_format_has_one_name():
    options = [CompressedTensorsOptions(**choices_of(name)) for name in NAMES]
    assert len({repr(each) for each in options}) == len(NAMES)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": {"q_proj": "int3"}}, r"layers: a format is 'int4', 'int4-32', .* got q_proj=int3\. Did you mean 'int8'"),
        ({"layers": {"nothing": "int8"}}, "layers pattern 'nothing' matches no"),
        ({"layers": {"embed_tokens": "int8"}}, r"'embed_tokens' matches model\.embed_tokens only, and skip has them"),
        ({"layers": {"q_proj": "int8"}, "skip": ("q_proj",)}, "only, and skip has them"),
        ({"layers": {"q_proj": "nvfp4"}}, r"q_proj is to be nvfp4 and .*k_proj int4: q_proj, k_proj, v_proj share one"),
        ({"weights": "nvfp4", "skip": ("layers.1.mlp.up_proj",)}, r"gate_proj is to be nvfp4 and .*up_proj bfloat16"),
        ({"layers": {"q_proj": "fp8"}, "method": "gptq"}, "method 'gptq' applies to int4 and int8 only, and layers has 'fp8'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_refused_in_words(folder, options, words):
    with pytest.raises(ConfigError, match=words):
        polyquant.plan(tiny_model("llama", folder / "dense"), "compressed-tensors", device="cpu", **options)


def test_groups_that_do_not_fit_a_layer_name_its_format(folder):
    with pytest.raises(
        ConfigError, match=r"128 do not divide in_features 90 .* another format for it in layers than 'int"
    ):
        polyquant.plan(tiny_model("odd", folder / "dense"), "compressed-tensors", device="cpu", strategy="channel",
                       layers={"q_proj": "int4-128"})  # fmt: skip


def test_a_group_whose_format_has_no_name_is_refused(mixed, tmp_path):
    def change(stored):
        for group in stored["config_groups"].values():
            if group["weights"]["group_size"] == 32 and group["weights"]["type"] == "int":
                group["weights"]["group_size"] = 16

    with pytest.raises(
        ModelError, match=r"its group_\d has weights int4, strategy group, group_size 16, .* read in int4,"
    ):
        load(changed_copy(mixed, tmp_path / "changed", stored=change))


def test_a_packed_layer_that_no_group_targets_is_refused(mixed, tmp_path):
    def change(stored):
        for group in stored["config_groups"].values():
            group["targets"] = [target for target in group["targets"] if target != "Linear"] or ["model.none"]

    path = changed_copy(mixed, tmp_path / "changed", stored=change)
    with pytest.raises(ModelError, match=r"k_proj cannot be read: it is packed, and no config group targets it"):
        load(path)
