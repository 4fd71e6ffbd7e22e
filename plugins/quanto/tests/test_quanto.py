"""quanto on a small random llama: options, odd sizes, skipped modules, checkpoints, training."""

import json
import subprocess
import sys
import threading
from types import SimpleNamespace

import polyquant
import pytest
import torch
from optimum.quanto import QLinear
from polyquant.errors import CheckpointConflict, ConfigError, ModelError
from polyquant.testing.checkpoints import adapter_gradients, assert_verified
from polyquant_quanto import _library
from polyquant_quanto.options import group_size
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WEIGHTS = ("int8", "int4", "int2", "float8")
TOKENS = [1, 2, 3, 4, 5, 6, 7]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A dense float32 llama of odd sizes: makes one with the given hidden and intermediate size."""

    def make(hidden=88, intermediate=203, *, tied=False, **config):
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp("tiny")
        config = LlamaConfig(
            vocab_size=64, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=hidden // 2, tie_word_embeddings=tied,
            bos_token_id=0, eos_token_id=1, **config,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(path)
        words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(64)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(path)
        return path

    return make


def load(path, **options):
    return polyquant.load(path, "quanto", device="cpu", **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "int3"}, "weights must be 'int8', 'int4', 'int2' or 'float8', got 'int3'"),
        ({"bits": 3}, "quanto has nothing with bits=3; bits are 8, 4, 2"),
        ({"activations": "int8"}, "unknown option 'activations'"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        load("nowhere", **options)


HOLDS = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_compile_lock_of_a_killed_process_is_noticed_and_the_load_goes_on(tiny, tmp_path, monkeypatch):
    extension = _library.get_extension("quanto_cpp")
    lock, notes = tmp_path / "lock", []

    def compiles(**_):
        assert not lock.exists()
        return SimpleNamespace(unpack=_library._unpack)

    monkeypatch.setattr(extension, "build_directory", str(tmp_path))
    monkeypatch.setattr(extension, "_lib", None)
    monkeypatch.setattr("optimum.quanto.library.extensions.extension.load", compiles)
    waits = threading.Thread(target=lambda: notes.extend(load(tiny(256, 384), weights="int4").notes))
    with subprocess.Popen([sys.executable, "-c", HOLDS, lock], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        waits.start()
        waits.join(5)
        assert waits.is_alive(), "it did not wait for a process that compiles"
        holder.kill()
    waits.join(60)
    assert not waits.is_alive()
    assert f"{lock} was left by a process that is gone, and was removed" in notes


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [{}, {"hidden": 256, "intermediate": 384, "attention_bias": True}])
def test_bytes_and_checkpoint(tiny, tmp_path, weights, dtype, sizes):
    loaded = load(tiny(**sizes), weights=weights, compute_dtype=dtype)
    assert_verified(loaded)
    loaded.save(tmp_path / "out")
    again = polyquant.load(tmp_path / "out", device="cpu")
    assert again.config == loaded.config or again.config.compute_dtype == loaded.config.compute_dtype == dtype
    assert_verified(again)
    assert torch.equal(loaded.logits(TOKENS), again.logits(TOKENS))
    assert [layer.stored_bytes for layer in again.layers] == [layer.stored_bytes for layer in loaded.layers]
    assert not list((tmp_path / "out").glob("*.bin"))


def test_group_sizes_are_those_of_the_library():
    from optimum.quanto import qint4

    for columns in (64, 96, 128, 160, 192, 200, 256, 288, 576, 1536, 4100):
        with torch.device("meta"):
            module = QLinear(columns, 8, weights=qint4)
        assert module.weight_group_size == group_size(columns), columns


def test_inference_mode_changes_nothing(tiny):
    loaded = load(tiny(256, 384), weights="int4")
    ids = torch.tensor([TOKENS])
    with torch.no_grad():
        expected = loaded.model(ids).logits
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, expected)


def test_skip(tiny):
    path = tiny()
    head = {"lm_head.weight"}
    down = {f"model.layers.{index}.mlp.down_proj.weight" for index in range(2)}

    def dense(**options):
        loaded = load(path, **options)
        assert_verified(loaded)
        return {layer.name for layer in loaded.layers if layer.role in ("linear", "head") and not layer.quantized}

    assert dense() == head
    assert dense(skip=("down_proj",)) == head | down
    assert dense(skip=("down_proj",), skip_defaults=False) == down
    assert dense(skip_defaults=False) == set()


def test_tied_head_stays_dense_and_survives_saving(tiny, tmp_path):
    loaded = load(tiny(tied=True), skip_defaults=False)
    loaded.save(tmp_path / "out")
    again = polyquant.load(tmp_path / "out", device="cpu")
    assert again.model.lm_head.weight is again.model.model.embed_tokens.weight
    assert torch.equal(loaded.logits(TOKENS), again.logits(TOKENS))


def test_another_compute_dtype_for_a_checkpoint(tiny, tmp_path):
    load(tiny(), weights="int4").save(tmp_path / "out")
    again = load(tmp_path / "out", compute_dtype="bfloat16")
    assert again.model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert_verified(again)
    with pytest.raises(CheckpointConflict, match="requested 'int8', stored 'int4'"):
        load(tmp_path / "out", weights="int8")


def test_damaged_checkpoints_name_the_tensor(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    out = tmp_path / "out"
    load(tiny()).save(out)
    tensors = load_file(out / "packed.safetensors")
    name = "model.layers.1.mlp.up_proj.weight._data"
    save_file({key: value for key, value in tensors.items() if key != name}, out / "packed.safetensors")
    with pytest.raises(ModelError, match="layers.1.mlp.up_proj cannot be read: weight._data is missing"):
        polyquant.load(out, device="cpu")
    save_file({**tensors, "model.extra": torch.zeros(1)}, out / "packed.safetensors")
    with pytest.raises(ModelError, match=r"have no place in the model: model\.extra"):
        polyquant.load(out, device="cpu")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["activations"] = "int8"
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="only weight quantization is read"):
        polyquant.load(out, device="cpu")


def test_the_library_itself_reads_the_tensors_that_are_saved(tiny, tmp_path):
    """Under the name that it looks for, and without the quantization_config, of which transformers makes its own."""
    from optimum.quanto import QuantizedModelForCausalLM

    loaded = load(tiny(tied=True), weights="int4")
    loaded.save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    (tmp_path / "out" / "packed.safetensors").rename(tmp_path / "out" / "model.safetensors")
    model = QuantizedModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([TOKENS])).logits[0], loaded.logits(TOKENS))


def test_without_a_compiler_it_unpacks_in_torch(tiny, monkeypatch):
    expected = load(tiny(256, 384), weights="int4").logits(TOKENS)

    def no_compiler(**_):
        raise OSError("no g++")

    monkeypatch.setattr(_library.get_extension("quanto_cpp"), "_lib", None)
    monkeypatch.setattr("optimum.quanto.library.extensions.extension.load", no_compiler)
    loaded = load(tiny(256, 384), weights="int4")
    assert any("could not be compiled (no g++)" in note for note in loaded.notes)
    assert torch.equal(loaded.logits(TOKENS), expected)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_adapters_get_the_gradients_of_the_dequantized_model(tiny, weights):
    path = tiny(256, 384)
    loaded = load(path, weights=weights)
    dense = LlamaForCausalLM.from_pretrained(path)
    for name, module in loaded.model.named_modules():
        if isinstance(module, QLinear):
            dense.get_submodule(name).weight.data = module.weight.dequantize().detach()

    expected = adapter_gradients(dense, TOKENS)
    found = adapter_gradients(loaded.backend.prepare_for_training(loaded), TOKENS)
    assert found.keys() == {name for name in expected if "lora" in name}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])
