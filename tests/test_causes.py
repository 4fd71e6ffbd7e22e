"""The cause decides the words: a machine, a file or an option is not blamed on the makers of a backend, nor otherwise."""

import json
import shutil

import pytest
import transformers
from polyquant import api
from polyquant.errors import BackendFailed, DenseModelError, ModelError
from polyquant.registry.registry import Registry
from polyquant.testing.models import tiny_model

from .conftest import GOOD_PLUGIN


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def others(folder):
    """GPT-2, whose matrices are in Conv1D modules, and Falcon, whose are in FalconLinear ones."""
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=384, n_positions=64)
    ).save_pretrained(folder / "gpt2")
    transformers.FalconForCausalLM(
        transformers.FalconConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=384)
    ).save_pretrained(folder / "falcon")
    for name in ("gpt2", "falcon"):
        transformers.AutoTokenizer.from_pretrained(tiny_model("llama", folder)).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        ("RuntimeError('Found no NVIDIA driver on your system.')", "this machine's GPU or its driver.*--device cpu"),
        ("AssertionError('Torch not compiled with CUDA enabled')", "this machine's GPU or its driver"),
        ("OSError(28, 'No space left on device', '/a/b')", "the disk is full: make room there"),
        ("PermissionError(13, 'Permission denied', '/a/b')", "see whether /a/b is there, and may be read and written"),
        ('RuntimeError("[enforce fail] DefaultCPUAllocator: can\'t allocate memory: you tried")', "more memory than is free"),
        ("type('OutOfMemoryError', (RuntimeError,), {})('CUDA out of memory.')", "it takes more memory than is free"),
    ],
)  # fmt: skip
def test_the_machine_is_not_blamed_on_the_makers(make_plugin, raised, words):
    make_plugin(
        GOOD_PLUGIN.replace(
            'return LoadedModel(model=None, tokenizer=None, config=config, kernel="none")', f"raise {raised}"
        )
    )
    with pytest.raises(BackendFailed, match=words) as caught:
        Registry().call("acme", "load", request=None, config=None)
    assert "tell the makers" not in str(caught.value)


def test_a_fault_of_the_plugin_is(make_plugin):
    make_plugin(
        GOOD_PLUGIN.replace(
            'return LoadedModel(model=None, tokenizer=None, config=config, kernel="none")', "raise KeyError('a')"
        )
    )
    with pytest.raises(BackendFailed, match="mend it there, or tell the makers of polyquant-acme 1.0"):
        Registry().call("acme", "load", request=None, config=None)


def changed(path, out, **entries):
    shutil.copytree(path, out)
    config = json.loads((out / "config.json").read_text()) | entries
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("backend", ["fp8", "hqq"])
def test_an_empty_quantization_config_is_the_config_s(folder, tmp_path, backend):
    path = changed(tiny_model("llama", folder), tmp_path / "out", quantization_config={})
    with pytest.raises(ModelError, match="quantization_config in its config is empty, .* take it out to load a dense"):
        api.load(path, backend, device="cpu")


def test_modules_that_a_backend_does_not_take_are_named(others):
    with pytest.raises(
        DenseModelError, match=r"the modules of its matrices are Conv1D \(transformer.h.0.* another backend"
    ):
        api.load(others / "gpt2", "fp8", device="cpu")


def test_modules_that_a_library_does_not_take_are_named(bitsandbytes, others):
    with pytest.raises(DenseModelError, match=r"the modules of its matrices are FalconLinear \(transformer.h.0"):
        api.load(others / "falcon", "bitsandbytes", device="cpu")


def test_a_skip_of_everything_is_the_skip_s(folder):
    with pytest.raises(
        DenseModelError, match=r"skip names all 14 that it takes, such as model\.layers\.0.*; take some out"
    ):
        api.load(tiny_model("llama", folder), "fp8", device="cpu", skip=("layers",))


def test_options_that_are_stored_are_not_advised(folder, tmp_path):
    """A checkpoint that was quantized already does not take skip, so no message says to use it."""
    stored = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    path = changed(tiny_model("mixtral", folder), tmp_path / "out", quantization_config=stored)
    for verb in (api.plan, api.load):
        with pytest.raises(ModelError) as caught:
            verb(path, "fp8", device="cpu")
        assert "skip=" not in str(caught.value), verb
