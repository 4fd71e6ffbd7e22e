"""Layers with block types of their own: planned, loaded, saved, read back; refused where a pattern or type is wrong."""

import re

import polyquant
import pytest
import torch
from polyquant.errors import ConfigError
from polyquant.loading.settle import as_flags
from polyquant.plugin import WeightInfo
from polyquant.testing.models import tiny_model
from polyquant_gguf.options import GgufOptions
from polyquant_gguf.planning import plan_layers

MIXED = {
    "mlp": "Q8_0",
    "mlp.up_proj": "Q5_1",
    "layers.1.mlp.up_proj": "Q4_1",
    "lm_head": "Q5_0",
    "embed_tokens": "Q8_0",
}
TYPES = {
    "model.embed_tokens": "Q8_0", "lm_head": "Q5_0", "model.layers.0.self_attn.q_proj": "Q4_0",
    "model.layers.0.mlp.down_proj": "Q8_0", "model.layers.0.mlp.up_proj": "Q5_1", "model.layers.1.mlp.up_proj": "Q4_1",
}  # fmt: skip


def schemes(loaded) -> dict[str, str]:
    return {layer.name.removesuffix(".weight"): layer.scheme for layer in loaded.layers if layer.quantized}


@pytest.mark.parametrize("kernel", ["library", "packed"])
def test_layers_have_types_of_their_own(tmp_path, kernel):
    model = tiny_model("llama", tmp_path)
    loaded = polyquant.load(model, "gguf", type="Q4_0", layers=MIXED, kernel=kernel)
    found = schemes(loaded)
    assert {name: found[name] for name in TYPES} == TYPES
    assert polyquant.verify(loaded).passed
    planned = polyquant.plan(model, "gguf", type="Q4_0", layers=MIXED, kernel=kernel)
    assert {plan.name: plan.stored_bytes for plan in planned.tensors} == {
        layer.name: layer.stored_bytes for layer in loaded.initial_layers
    }
    again = polyquant.load(loaded.save(tmp_path / "out"), kernel=kernel)
    assert again.config == loaded.config
    assert schemes(again) == found
    assert torch.equal(again.logits([5, 6, 7]), loaded.logits([5, 6, 7]))
    assert GgufOptions.from_stored(loaded.config.to_stored()).layers == loaded.config.layers


def test_of_several_patterns_the_last_that_matches_is_taken(tmp_path):
    model = tiny_model("llama-tied", tmp_path)
    loaded = polyquant.load(model, "gguf", layers={"layers.1.mlp.up_proj": "Q4_1", "mlp.*_proj": "Q8_0"})
    assert schemes(loaded)["model.layers.1.mlp.up_proj"] == "Q8_0"


def test_they_are_read_as_text_too(tmp_path):
    handle = polyquant.backend("gguf")
    expected = (("mlp", "Q8_0"), ("lm_head", "Q5_0"))
    for written in (
        dict(expected),
        ["mlp=Q8_0", "lm_head=Q5_0"],
        ["mlp=Q8_0,lm_head=Q5_0"],
        "mlp=Q8_0,lm_head=Q5_0",
        "mlp=Q8_0; lm_head=Q5_0",
    ):
        assert handle.config({"layers": written}).layers == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": {"nix_proj": "Q8_0"}}, "layers pattern 'nix_proj' matches no module; name parts here are 0, 1, down"),
        ({"layers": {"mlp": "Q9_0"}}, "'Q8_0', 'TQ1_0', 'TQ2_0' or 'MXFP4', as in --layer PATTERN=FORMAT; got mlp=Q9_0"),
        ({"layers": "mlp"}, "layers: a format is 'Q4_0'"),
        ({"layers": {"mlp": "Q8_0"}, "skip": ("mlp",)}, "matches model.layers.0.mlp.gate_proj, "),
        ({"layers": {"lm_head": "Q8_0"}}, "lm_head.weight is tied to model.embed_tokens.weight: name that one"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(tmp_path, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        polyquant.load(tiny_model("llama-tied", tmp_path), "gguf", **options)


def test_a_files_types_are_its_own(tmp_path):
    with pytest.raises(ConfigError, match="layers are for a dense checkpoint"):
        polyquant.backend("gguf").config({"type": "file", "layers": {"mlp": "Q8_0"}})


def test_rows_that_are_no_whole_blocks_are_refused_where_they_were_named():
    weight = WeightInfo(name="h.up.weight", shape=(64, 96), dtype="float32", role="linear", module="Linear")
    with pytest.raises(ConfigError, match="another type for it in layers"):
        plan_layers([weight], GgufOptions(layers=(("h.up", "TQ2_0"),)))
    with pytest.raises(ConfigError, match="layers names h.up, a Conv1D"):
        moved = WeightInfo(name="h.up.weight", shape=(64, 96), dtype="float32", role="linear", module="Conv1D")
        plan_layers([moved], GgufOptions(layers=(("h.up", "Q8_0"),)))


@pytest.mark.parametrize(
    "written", [{"mlp": "Q8_0", "a.*": "Q5_0"}, ["mlp=Q8_0", "a.*=Q5_0"], [["mlp", "Q8_0"], ["a.*", "Q5_0"]]]
)
def test_commands_name_them_one_by_one(written):
    assert as_flags({"type": "Q4_0", "layers": written}) == " --type Q4_0 --layer mlp=Q8_0 --layer a.*=Q5_0"
