"""HQQ on small random models: options, group sizes, skipped modules, checkpoints, training."""

import json

import polyquant
import pytest
import torch
from hqq.core.quantize import HQQLinear
from polyquant.errors import CheckpointConflict, ConfigError, ModelError
from polyquant.testing.checkpoints import adapter_gradients, assert_verified
from polyquant.testing.models import tiny_model
from polyquant_hqq import _layers, _quantize
from polyquant_hqq.options import HqqOptions
from transformers import LlamaForCausalLM

TOKENS = [3, 4, 5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def load(path, **options):
    return polyquant.load(path, "hqq", device="cpu", **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 5}, "bits must be 1, 2, 3, 4 or 8, got 5"),
        ({"group_size": 12}, "group_size must be"),
        ({"group_size": 0}, "group_size must be"),
        ({"axis": 2}, "axis must be 0 or 1, got 2"),
        ({"nbits": 4}, "unknown option 'nbits'"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        load("nowhere", **options)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_bytes_and_checkpoint(folder, tmp_path, bits, axis):
    loaded = load(tiny_model("qwen2", folder), bits=bits, axis=axis)
    assert_verified(loaded)
    loaded.save(tmp_path / "out")
    again = polyquant.load(tmp_path / "out", device="cpu")
    assert again.config == loaded.config
    assert_verified(again)
    assert torch.equal(loaded.logits(TOKENS), again.logits(TOKENS))
    again.save(tmp_path / "second")
    files = [(tmp_path / name / "packed.safetensors").read_bytes() for name in ("out", "second")]
    assert files[0] == files[1]


def test_tied_head_bfloat16_and_another_compute_dtype(folder, tmp_path):
    loaded = load(tiny_model("llama-tied", folder), compute_dtype="bfloat16", skip_defaults=False)
    assert_verified(loaded)
    assert {str(value.dtype) for value in loaded.model.parameters()} == {"torch.bfloat16", "torch.uint8"}
    assert loaded.model.model.rotary_emb.inv_freq.dtype == torch.float32
    loaded.save(tmp_path / "out")
    again = polyquant.load(tmp_path / "out", device="cpu")
    assert again.model.lm_head.weight is again.model.model.embed_tokens.weight
    assert torch.equal(loaded.logits(TOKENS), again.logits(TOKENS))
    assert_verified(load(tmp_path / "out", compute_dtype="float32"))
    with pytest.raises(CheckpointConflict, match="requested 8, stored 4"):
        load(tmp_path / "out", bits=8)


def test_a_group_size_that_does_not_divide_names_the_layer(folder):
    odd = tiny_model("odd", folder)
    with pytest.raises(
        ConfigError, match=r"64 does not divide in_features 90 in model\.layers\.0\.self_attn\.q_proj\.weight"
    ):
        load(odd)
    with pytest.raises(ConfigError, match=r"out_features 203 in model\.layers\.0\.mlp.*; use skip=\('gate_proj',\)"):
        load(odd, axis=0, group_size=8, skip=("self_attn",))


def test_optimizing_pays_and_its_absence_is_said(folder):
    path = tiny_model("llama", folder)
    dense = LlamaForCausalLM.from_pretrained(path)
    name = "model.layers.0.mlp.up_proj"

    def error(loaded):
        weight = loaded.model.get_submodule(name).dequantize()
        return (weight - dense.get_submodule(name).weight).abs().pow(0.7).mean()

    plain, optimized = load(path, bits=3, optimize=False), load(path, bits=3)
    assert error(optimized) < error(plain)
    assert any("plain rounding" in note for note in plain.notes)
    assert not optimized.notes


def test_skip(folder, tmp_path):
    path, head = tiny_model("llama", folder), {"lm_head.weight"}
    down = {f"model.layers.{index}.mlp.down_proj.weight" for index in range(2)}

    def dense(**options):
        loaded = load(path, **options)
        assert_verified(loaded)
        found = {layer.name for layer in loaded.layers if layer.role in ("linear", "head") and not layer.quantized}
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        loaded.save(out)
        again = polyquant.load(out, device="cpu")
        assert again.config == loaded.config
        assert_verified(again)
        return found

    assert dense() == head
    assert dense(skip=("down_proj",)) == head | down
    assert dense(skip=("down_proj",), skip_defaults=False) == down
    assert dense(skip_defaults=False) == set()


def test_nothing_of_a_checkpoint_is_evaluated(folder, tmp_path):
    """hqq's own reading gives the text in `compute_dtype` to eval; here it is left over, and refused or ignored."""
    from safetensors.torch import load_file, save_file

    loaded = load(tiny_model("llama", folder))
    loaded.save(tmp_path / "out")
    file = tmp_path / "out" / "packed.safetensors"
    evil = f"open({str(tmp_path / 'evil')!r}, 'w')"
    extra = {
        "compute_dtype": torch.tensor([ord(letter) for letter in evil], dtype=torch.uint8),
        "nbits": torch.tensor(4),
    }
    prefix = "model.layers.0.mlp.up_proj"
    save_file(load_file(file) | {f"{prefix}.{name}": value for name, value in extra.items()}, file)
    again = polyquant.load(tmp_path / "out", device="cpu")
    assert torch.equal(loaded.logits(TOKENS), again.logits(TOKENS))
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda stored: stored["quant_config"].update(offload_meta=True), "uses offload_meta, which is not read"),
        (lambda stored: stored.update(quant_config={"self_attn.q_proj": {}}), "gives layers different options"),
    ],
)
def test_what_is_not_read_is_refused(folder, tmp_path, change, words):
    load(tiny_model("llama", folder)).save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=words):
        polyquant.load(tmp_path / "out", device="cpu")


def test_damaged_checkpoints_name_the_layer(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    load(tiny_model("llama", folder)).save(tmp_path / "out")
    file, name = tmp_path / "out" / "packed.safetensors", "model.layers.1.mlp.up_proj"
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if key != f"{name}.scale"}, file)
    with pytest.raises(ModelError, match=f"{name} cannot be read: scale is missing"):
        polyquant.load(tmp_path / "out", device="cpu")
    save_file({key: value for key, value in tensors.items() if not key.startswith(name)}, file)
    with pytest.raises(ModelError, match=rf"{name}\.weight of the model is not in the checkpoint"):
        polyquant.load(tmp_path / "out", device="cpu")


def test_progress_is_drawn_only_where_asked(folder, capfd):
    path = tiny_model("llama", folder)
    capfd.readouterr()
    load(path, optimize=False)
    assert capfd.readouterr() == ("", "")
    load(path, optimize=False, progress=True)
    assert "Quantizing" in capfd.readouterr().err


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_adapters_get_the_gradients_of_the_dequantized_model(folder, bits):
    path = tiny_model("qwen2", folder)
    loaded = load(path, bits=bits)
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(path)
    for name, module in loaded.model.named_modules():
        if isinstance(module, HQQLinear):
            dense.get_submodule(name).weight.data = module.dequantize().detach()

    expected = adapter_gradients(dense, TOKENS)
    found = adapter_gradients(loaded.backend.prepare_for_training(loaded), TOKENS)
    assert found.keys() == {name for name in expected if "lora" in name}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("power", [1, 3])
def test_some_groups_at_a_time_as_all_at_once(monkeypatch, power, bits, axis):
    monkeypatch.setattr(_quantize, "SEARCHED_WEIGHTS", 2**14)
    config = HqqOptions(bits=bits, axis=axis, compute_dtype="float32")
    weight = (torch.randn(288, 768, generator=torch.Generator().manual_seed(0)) * 0.05) ** power * 20

    def linear():
        layer = torch.nn.Linear(768, 288, bias=False)
        layer.weight.data = weight.clone()
        return layer

    ours = _layers.quantize_linear(linear(), config)
    theirs = HQQLinear(linear(), config.quantize_config(), compute_dtype=torch.float32, device="cpu")
    assert torch.equal(ours.W_q, theirs.W_q)
    assert all(torch.equal(ours.meta[name], theirs.meta[name]) for name in ("scale", "zero"))
