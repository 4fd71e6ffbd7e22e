"""Speed that is foreseen: the stand-in is made as the model is, and what it says is kept."""

import json
import os

import polyquant
import pytest
from polyquant.packed_weights.half import HalfEmbedding, HalfLinear
from polyquant.packed_weights.step import Forward
from polyquant.planning import foresee, stand_in
from polyquant.planning.model import PlannedModel
from polyquant.planning.stand_in import StandIn
from polyquant.testing.models import tiny_model

CASES = [
    ("llama", {"quant_type": "nf4"}), ("llama-tied", {"quant_type": "nf4"}), ("llama-tied", {"embeddings": "8bit"}),
    ("llama", {"bits": 8}), ("qwen2", {"quant_type": "fp4"}), ("llama", {"embeddings": "keep", "head": "4bit"}),
    ("llama", {"quant_type": "nf4", "double_quant": True}),
]  # fmt: skip


def built(folder, plan):
    return StandIn(PlannedModel(folder).config, {each.name: each for each in plan.tensors}, trust_remote_code=False)


def shape_of(model):
    """Kinds of modules, and all tensors by their names, without what they hold."""
    plain = {HalfEmbedding: "Embedding", HalfLinear: "Linear"}
    kinds = {name: plain.get(type(module), type(module).__name__) for name, module in model.named_modules()}
    tensors = {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.named_parameters(remove_duplicate=False)
    }
    return kinds, tensors, isinstance(model.get_decoder().forward, Forward)


@pytest.mark.parametrize(("model", "options"), CASES)
def test_the_stand_in_is_made_as_the_model_is(bitsandbytes, tmp_path, model, options):
    folder = tiny_model(model, tmp_path)
    loaded = polyquant.load(folder, "bitsandbytes", device="cpu", kernel="packed", **options)
    plan = polyquant.plan(folder, "bitsandbytes", device="cpu", kernel="packed", **options)
    made = built(folder, plan)
    made._put(made.depth)
    assert shape_of(made._model) == shape_of(loaded.model)


def test_layers_of_several_kinds_come_in_their_order(bitsandbytes, tmp_path):
    from transformers import Gemma2Config

    folder = tiny_model("llama", tmp_path)
    kinds = ["sliding_attention", "full_attention"] * 3
    config = Gemma2Config(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, layer_types=kinds,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["Gemma2ForCausalLM"]}))
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    plan = polyquant.plan(folder, "bitsandbytes", device="cpu", kernel="packed")
    made = built(folder, plan)
    made._put(6)
    layers = made._model.get_decoder().layers
    assert [layer.self_attn.sliding_window is not None for layer in layers] == [
        kind == "sliding_attention" for kind in kinds
    ]
    assert [layer.self_attn.layer_idx for layer in layers] == [*range(6)]


def test_layers_that_are_not_made_count_as_those_that_are(bitsandbytes, tmp_path, monkeypatch):
    """Of a model that goes beyond the caches, two depths tell what one more layer takes."""
    folder = tiny_model("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 100}))
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    plan = polyquant.plan(folder, "bitsandbytes", device="cpu", kernel="packed")
    monkeypatch.setattr(stand_in, "COLD_BYTES", 2**19)
    made = built(folder, plan)
    assert 2 <= made._most < 100
    depths = list[int]()
    real = made._speed
    monkeypatch.setattr(made, "_speed", lambda layers, *tokens: (depths.append(layers), real(layers, *tokens))[1])
    foreseen = made.token_seconds()
    assert depths == [made._most, made._most // 2]
    shallow = 1 / real(made._most // 2, 1, 32).generated_tokens_per_second.mean
    assert foreseen > shallow


def test_what_was_foreseen_is_kept(bitsandbytes, tmp_path, monkeypatch):
    monkeypatch.setenv("POLYQUANT_CACHE", str(tmp_path / "cache"))
    folder = tiny_model("llama", tmp_path)

    def planned(**options):
        return polyquant.plan(folder, "bitsandbytes", device="cpu", kernel="packed", speed=True, **options).foreseen

    first = planned(quant_type="nf4")
    assert first.generated_tokens_per_second > 0 < first.prompt_tokens_per_second
    monkeypatch.setattr(foresee, "_measured", lambda *_, **__: pytest.fail("measured again"))
    assert planned(quant_type="nf4") == first
    (kept,) = (tmp_path / "cache" / foresee.FOLDER).iterdir()
    monkeypatch.undo()
    monkeypatch.setenv("POLYQUANT_CACHE", str(tmp_path / "cache"))
    kept.write_text("{")
    assert planned(quant_type="nf4").generated_tokens_per_second > 0  # measured again
    assert planned(bits=8) != first


def test_what_is_not_foreseen_says_why(bitsandbytes, tmp_path):
    folder = tiny_model("llama", tmp_path)
    library = polyquant.plan(folder, "bitsandbytes", device="cpu", kernel="library", speed=True)
    assert "own kernels" in library.foreseen.why
    odd = polyquant.plan(tiny_model("odd", tmp_path), "bitsandbytes", device="cpu", kernel="packed", speed=True)
    assert "own kernels" in odd.foreseen.why  # no group divides its columns
    there = polyquant.plan(folder, "bitsandbytes", devices="cuda:0=24GiB", kernel="library", speed=True)
    assert "this is cuda" in there.foreseen.why
    experts = polyquant.plan(tiny_model("mixtral", tmp_path), "bitsandbytes", device="cpu", kernel="packed", speed=True)
    assert "is no matrix of a linear layer" in experts.foreseen.why
    assert polyquant.plan(folder, "bitsandbytes", device="cpu").foreseen is None


def test_a_recommendation_for_speed_goes_by_it(bitsandbytes, tmp_path):
    found = polyquant.recommend(
        tiny_model("llama", tmp_path), goal="speed", device="cpu", speed=True, comparisons=tmp_path / "none"
    )
    foreseen = ["foreseen here" in choice.reason for choice in found.choices]
    assert foreseen == sorted(foreseen, reverse=True)  # those that are not come after


def test_commands_show_it(bitsandbytes, run_python, tmp_path):
    folder = str(tiny_model("llama", tmp_path))
    words = ["plan", folder, "-b", "bitsandbytes", "--device", "cpu", "--speed"]
    environment = {**os.environ, "POLYQUANT_CACHE": str(tmp_path / "cache"), "POLYQUANT_KERNEL": "auto"}
    shown = run_python(*words, env=environment).stdout
    assert "generated tokens/s" in shown
    told = json.loads(run_python(*words, "--json", env=environment).stdout)["foreseen"]
    assert told["generated_tokens_per_second"] > 0
