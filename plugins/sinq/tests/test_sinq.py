"""SINQ on small random models: options, group sizes, skipped modules, checkpoints of both dialects, training."""

import json
import os
import subprocess
import sys

import polyquant
import pytest
import torch
from polyquant.errors import CheckpointConflict, ConfigError, ModelError, UnsupportedOperation
from polyquant.plugin import WeightInfo
from polyquant.testing.checkpoints import assert_verified, changed_copy, put
from polyquant.testing.models import tiny_model
from polyquant.testing.processes import run_python
from polyquant_sinq._layers import SinqLinear, quantize_linear
from polyquant_sinq.options import SinqOptions
from polyquant_sinq.planning import plan_layers
from polyquant.testing.oracles import agree
from transformers import AutoModelForCausalLM, LlamaForCausalLM

TOKENS = [3, 4, 5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def checkpoint(folder):
    """A saved 4 bit model, not to be changed."""
    return load(tiny_model("llama", folder)).save(folder / "int4")


def load(path, **options):
    return polyquant.load(path, "sinq", device="cpu", **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 7}, "bits must be 2, 3, 4, 5, 6 or 8, got 7"),
        ({"group_size": 8}, "group_size must be"),
        ({"group_size": 36}, "group_size must be"),
        ({"tiling": "2d"}, "tiling must be '1D' or '2D', got '2d'"),
        ({"method": "hqq"}, "method must be 'sinq' or 'asinq', got 'hqq'"),
        ({"nbits": 4}, "unknown option 'nbits'"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        load("nowhere", **options)


@pytest.mark.parametrize("tiling", ["1D", "2D"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_layer_is_that_of_sinq_itself(bits, tiling):
    from sinq.sinqlinear_hf import SINQLinear, sinq_base_quant_config

    linear = torch.nn.Linear(256, 192)
    native = sinq_base_quant_config(nbits=bits, group_size=64, tiling_mode=tiling, method="sinq")
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        theirs = SINQLinear(256, 192, quant_config=native, compute_dtype=dtype, device="cpu", use_unpack_kernel=True)
        theirs.quantize(linear.weight.data)
        ours = quantize_linear(linear, SinqOptions(bits=bits, tiling=tiling, compute_dtype=name))
        agree("sinq", "sinq's SINQLinear", ours.dequantize(), theirs.dequantize())
        assert ours.dequantize().dtype == dtype
    step = 2 * linear.weight.abs().max() / (2**bits - 1)
    assert (ours.dequantize(torch.float32) - linear.weight).abs().max() < 3 * step  # scales are rounded too
    x = torch.randn(3, 256)
    dense = x @ ours.dequantize(torch.float32).T + linear.bias
    torch.testing.assert_close(ours(x), dense)


@pytest.mark.parametrize(("bits", "tiling"), [(2, "1D"), (3, "2D"), (5, "1D")])
def test_bytes_and_checkpoint(folder, tmp_path, bits, tiling):
    loaded = load(tiny_model("qwen2", folder), bits=bits, tiling=tiling)
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
    assert {str(value.dtype) for value in loaded.model.parameters()} == {"torch.bfloat16"}
    assert loaded.model.model.rotary_emb.inv_freq.dtype == torch.float32
    loaded.save(tmp_path / "out")
    again = polyquant.load(tmp_path / "out", device="cpu")
    assert again.model.lm_head.weight is again.model.model.embed_tokens.weight
    assert torch.equal(loaded.logits(TOKENS), again.logits(TOKENS))
    assert_verified(load(tmp_path / "out", compute_dtype="float32"))
    with pytest.raises(CheckpointConflict, match="requested 8, stored 4"):
        load(tmp_path / "out", bits=8)


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        (
            (64, 90),
            {},
            r"group_size 64 does not divide in_features 90 in a\.q_proj\.weight \(64, 90\); use skip=\('q_proj',\)",
        ),
        ((64, 96), {}, r"group_size 64 does not divide in_features 96 .*; use group_size=48 or skip"),
        ((96, 128), {"tiling": "2D"}, r"does not divide out_features 96, as tiling='2D'.*; use group_size=32 or skip"),
        (
            (8, 128),
            {},
            r"gives 16 groups, and sinq rounds scales by 32s, in a\.q_proj\.weight \(8, 128\); use group_size=32 or",
        ),
    ],
)
def test_a_group_size_that_does_not_fit_names_the_layer(shape, options, words):
    weight = WeightInfo(name="a.q_proj.weight", shape=shape, dtype="float32", role="linear", module="Linear")
    with pytest.raises(ConfigError, match=words):
        plan_layers([weight], SinqOptions(**options))


def test_skip(folder, tmp_path):
    path, head = tiny_model("llama", folder), {"lm_head.weight"}
    down = {f"model.layers.{index}.mlp.down_proj.weight" for index in range(2)}

    def dense(**options):
        loaded = load(path, **options)
        found = {layer.name for layer in loaded.layers if layer.role in ("linear", "head") and not layer.quantized}
        again = polyquant.load(loaded.save(tmp_path / f"out{len(list(tmp_path.iterdir()))}"), device="cpu")
        assert again.config == loaded.config
        assert_verified(again)
        return found

    assert dense(skip=("down_proj",)) == head | down
    assert dense(skip=("down_proj",), skip_defaults=False) == down
    assert dense(skip_defaults=False) == set()


LIBRARY = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, SinqConfig
dense, out = sys.argv[1:]
config = SinqConfig(nbits=4, group_size=64, modules_to_not_convert=["down_proj"])
model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=torch.bfloat16, device_map="cpu")
model.save_pretrained(out)
AutoTokenizer.from_pretrained(dense).save_pretrained(out)
print(json.dumps(model(torch.tensor([[3, 4, 5, 6, 7, 8, 9]])).logits.float().tolist()))
"""


def test_a_checkpoint_written_by_sinq_itself(folder, tmp_path):
    expected = torch.tensor(run_python(LIBRARY, str(tiny_model("llama", folder)), str(tmp_path / "out")))[0]
    loaded = load(tmp_path / "out", compute_dtype="bfloat16")
    dense = {layer.name for layer in loaded.layers if layer.role in ("linear", "head") and not layer.quantized}
    assert dense == {f"model.layers.{index}.mlp.down_proj.weight" for index in range(2)}
    torch.testing.assert_close(loaded.logits(TOKENS), expected)
    assert_verified(loaded)
    assert load(tmp_path / "out").model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_asinq_is_read_and_not_made(folder, checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="'asinq' is read from checkpoints only"):
        load(tiny_model("llama", folder), method="asinq")
    out = changed_copy(checkpoint, tmp_path / "out", stored=lambda stored: stored.update(method="asinq"))
    assert polyquant.load(out, device="cpu").config.method == "asinq"


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        ({}, {f"{UP}.meta.scale.s": None}, rf"{UP} cannot be read: scale_step is missing"),
        (
            {},
            {f"{UP}.meta.zero.x": torch.zeros(2048, 1)},
            rf"{UP} cannot be read: zero of a layer .* uint8, and is .* float32",
        ),
        ({}, {f"{UP}.W_q": None, f"{UP}.meta.scale.x": None}, "has no place in the model|have no place in the model"),
        (
            {},
            {"model.layers.7.mlp.up_proj.meta.scale.x": torch.zeros(2)},
            r"no place in the model: model\.layers\.7\.mlp\.up_proj",
        ),
        ({"nbits": 8}, {}, r"cannot be read: weight of a layer .* should be .* uint8, and is .* uint8"),
        ({"nbits": 1.58}, {}, "cannot read its quantization_config"),
        ({"method": "sinq_nf4"}, {}, "cannot read its quantization_config: Invalid enum value 'sinq_nf4'"),
        ({"group_size": None}, {}, "cannot read its quantization_config"),
    ],
)
def test_damaged_and_foreign_checkpoints_are_refused(checkpoint, tmp_path, config, tensors, words):
    with pytest.raises(ModelError, match=words):
        polyquant.load(
            changed_copy(checkpoint, tmp_path / "out", put(tensors), lambda stored: stored.update(config)), device="cpu"
        )


def test_layers_that_sinq_rounds_plainly_are_counted(folder, tmp_path):
    model = LlamaForCausalLM.from_pretrained(tiny_model("llama", folder))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.pow_(3)
    heavy = tmp_path / "heavy"
    model.save_pretrained(heavy)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (heavy / name).write_bytes((tiny_model("llama", folder) / name).read_bytes())
    loaded = load(heavy)
    assert any(note.startswith("1 of 14 layers have so heavy tails") for note in loaded.notes)
    assert not load(tiny_model("llama", folder)).notes


NOTES = """
import json, sys
started = "transformers" in sys.modules
import polyquant
print(json.dumps([started, polyquant.load(sys.argv[1], device="cpu").notes]))
"""


def test_what_installing_sinq_does_is_said_at_load(checkpoint):
    environment = {**os.environ, "SINQ_AUTO_PATCH": "1"}
    command = [sys.executable, "-c", NOTES, str(checkpoint)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    started, notes = json.loads(result.stdout.splitlines()[-1])
    assert started
    assert len(notes) == 1
    assert "set SINQ_AUTO_PATCH=0" in notes[0]


def test_progress_is_drawn_only_where_asked(folder, capfd):
    path = tiny_model("llama", folder)
    capfd.readouterr()
    load(path)
    assert capfd.readouterr() == ("", "")
    load(path, progress=True)
    assert "Quantizing" in capfd.readouterr().err


def test_adapters_get_the_gradients_of_the_dequantized_model(folder):
    from peft import LoraConfig, get_peft_model

    path = tiny_model("qwen2", folder)
    loaded = load(path)
    dense = AutoModelForCausalLM.from_pretrained(path)
    for name, module in loaded.model.named_modules():
        if isinstance(module, SinqLinear):
            dense.get_submodule(name).weight.data = module.dequantize()

    def adapted(model):
        torch.manual_seed(1)
        return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))

    def gradients(model):
        model.train()
        ids = torch.tensor([TOKENS])
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}

    expected = gradients(adapted(dense))
    model = adapted(loaded.backend.prepare_for_training(loaded))
    found = gradients(model)
    assert found.keys() == {name for name in expected if "lora" in name}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedOperation, match=r"is packed by sinq: merge with polyquant\.merge"):
        model.merge_adapter()
