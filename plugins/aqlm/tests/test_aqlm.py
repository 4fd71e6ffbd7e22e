"""AQLM on small checkpoints made by a simple quantizer: products, dialects, damage, training, other readers."""

from functools import partial

import numba
import polyquant
import pytest
import torch
from polyquant.errors import CheckpointConflict, ConfigError, ModelError
from polyquant.models.resolve import resolve_dense
from polyquant.measure.quality.divergence import kl_divergence
from polyquant.testing.checkpoints import adapter_gradients, changed_copy, replaced, without
from polyquant.testing.models import tiny_model
from polyquant.testing.texts import EVALUATION
from polyquant_aqlm._layers import QuantizedLinear
from polyquant_aqlm._kernels import DEQUANTIZE, LOOKUP
from polyquant.testing.oracles import agree
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from .checkpoints import make

TOKENS = [3, 4, 5, 6, 7, 8, 9, 10]
FORMATS = {  # codebooks, bits, (out_group_size, in_group_size)
    "2x8": (2, 8, (1, 8)), "1x12": (1, 12, (1, 8)), "3x4": (3, 4, (1, 4)), "2x8-rows": (2, 8, (2, 4)),
}  # fmt: skip
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def checkpoint(folder):
    return make(tiny_model("qwen2", folder), folder / "quantized")


@pytest.fixture
def changed(checkpoint, tmp_path):
    """The checkpoint with its tensors and its quantization_config changed by functions."""
    return partial(changed_copy, checkpoint, tmp_path)


def load(path, **options):
    return polyquant.load(path, "aqlm", device="cpu", **options)


def dequantized(codes, codebooks, scales):
    """The definition, element by element of the codes."""
    vectors = sum(book[codes[:, :, index].long() % len(book)] for index, book in enumerate(codebooks))
    return (vectors * scales).swapaxes(1, 2).flatten(2).flatten(0, 1)


def dense_twin(path, checkpoint):
    """The dense model of the weights that the checkpoint's codes stand for."""
    model, tensors = AutoModelForCausalLM.from_pretrained(path), load_file(checkpoint / "model.safetensors")
    for name in [name.removesuffix(".codes") for name in tensors if name.endswith(".codes")]:
        parts = [tensors[f"{name}.{key}"] for key in ("codes", "codebooks", "scales")]
        model.get_submodule(name).weight.data = dequantized(*parts)
    return model


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nbits_per_codebook": 17}, "nbits_per_codebook must be"),
        ({"num_codebooks": 0}, "num_codebooks must be"),
        ({"num_codebooks": 16}, "is 16 bits a weight; 0.5 to 8.5 are read"),
        ({"in_group_size": 64}, "is 0.25 bits a weight"),
        ({"kernel": "numba"}, "kernel must be 'auto', 'lookup' or 'dequantize', got 'numba'"),
        ({"kernel": "lookup", "nbits_per_codebook": 16}, "'lookup' is for 8-bit codes and out_group_size 1"),
        ({"group_size": 8}, "unknown option 'group_size'"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        load("nowhere", **options)


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_the_dequantized_weights(folder, tmp_path, name):
    books, bits, group = FORMATS[name]
    path = tiny_model("qwen2", folder)
    checkpoint = make(path, tmp_path / "out", books=books, bits=bits, group=group)
    loaded = load(checkpoint)
    report = polyquant.verify(loaded, max_new_tokens=2)
    assert not [check for check in report.failures if check.name != "sample"]
    assert loaded.kernel == (LOOKUP if name == "2x8" else DEQUANTIZE)
    twin = dense_twin(path, checkpoint)
    for count in (1, 6, 7):
        ids = torch.tensor([TOKENS[:count]])
        with torch.inference_mode():
            agree("aqlm", "logits of the weights by definition", loaded.logits(TOKENS[:count]), twin(ids).logits[0],
                  allowed=1e-4)  # fmt: skip


def test_threads_do_not_change_the_result(folder):
    """aqlm's own kernel gives noise with two threads."""
    checkpoint = make(tiny_model("llama", folder), folder / "threads", books=4)
    loaded, before, numbas = load(checkpoint), torch.get_num_threads(), numba.get_num_threads()
    tokens, results = TOKENS[:3], {}
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results[threads] = [loaded.logits(tokens) for _ in range(10)]
    finally:
        torch.set_num_threads(before)
    expected = load(checkpoint, kernel="dequantize").logits(tokens)
    for threads, logits in results.items():
        assert all(torch.equal(logits[0], other) for other in logits), f"{threads} threads: not always the same"
        torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=2e-4)
    assert numba.get_num_threads() == numbas


def test_kernels(checkpoint):
    loaded = load(checkpoint, compute_dtype="bfloat16")
    assert loaded.kernel == DEQUANTIZE
    assert not loaded.notes
    difference = (loaded.logits(TOKENS) - load(checkpoint).logits(TOKENS)).abs().max()
    assert 0 < difference < 0.3
    with pytest.raises(ModelError, match="'lookup' runs on the CPU in float32, not on cpu in bfloat16"):
        load(checkpoint, compute_dtype="bfloat16", kernel="lookup")
    loaded = load(checkpoint, kernel="dequantize")
    assert loaded.kernel == DEQUANTIZE
    assert "numba" in load(checkpoint).notes[0]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (without(f"{LAYER}.codes"), f"{LAYER} cannot be read: codes is missing; it has codebooks, scales"),
        (without(f"{LAYER}.codebooks"), f"{LAYER} cannot be read: codebooks is missing"),
        (without(f"{LAYER}.scales"), f"{LAYER} cannot be read: scales is missing"),
        (without("model.layers.1.self_attn.q_proj.bias"), r"q_proj cannot be read: bias is missing"),
        (without("model.norm.weight"), r"model\.norm\.weight of the model is not in the checkpoint"),
        (
            replaced(f"{LAYER}.codes", lambda codes: codes[:-1]),
            rf"{LAYER} cannot be read: codes of .* should be \(512, 32, 2\) int8",
        ),
        (
            replaced(f"{LAYER}.codes", lambda codes: codes.swapaxes(0, 1).contiguous()),
            r"and is \(32, 512, 2\) int8",
        ),
        (
            replaced(f"{LAYER}.codebooks", lambda books: books[:1]),
            r"codebooks of .* should be \(2, 256, 1, 8\) float, and is \(1, 256, 1, 8\) float32",
        ),
        (replaced(f"{LAYER}.codes", lambda codes: codes.short()), "int8, and is .* int16"),
        (replaced(f"{LAYER}.scales", lambda scales: scales.int()), "float, and is .* int32"),
        (
            lambda found: found.update({f"{LAYER}.weight": torch.zeros(512, 256)}),
            f"{LAYER} cannot be read: weight has no place beside codebooks, codes, scales",
        ),
        (
            lambda found: found.update({"lm_head.codes": torch.zeros(1, dtype=torch.int8)}),
            "lm_head cannot be read: codebooks, scales is missing; it has codes, weight",
        ),
    ],
)
def test_damaged_checkpoints_name_the_layer(changed, tensors, words):
    with pytest.raises(ModelError, match=words):
        load(changed(tensors))


def test_a_dense_layer_that_the_config_calls_quantized_is_read_as_it_is(changed):
    def dense(tensors):
        for key in ("codes", "codebooks", "scales"):
            del tensors[f"{LAYER}.{key}"]
        tensors[f"{LAYER}.weight"] = torch.zeros(512, 256)

    listed = changed(dense, lambda stored: stored["linear_weights_not_to_quantize"].append(f"{LAYER}.weight"))
    for loaded in (load(changed(dense)), load(listed)):
        layer = next(layer for layer in loaded.layers if layer.name == f"{LAYER}.weight")
        assert (layer.quantized, layer.reason) == (False, "skipped on request")
    assert any("layers are dense in the checkpoint" in note for note in load(changed(dense)).notes)


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (lambda stored: stored.update(in_group_size=16), r"codes of .* should be \(256, 16, 2\)"),
        (lambda stored: stored.update(in_group_size="8"), "cannot read its quantization_config"),
        (lambda stored: stored.update(rotation="hadamard"), "it has rotation, which is not read"),
        (lambda stored: stored.pop("num_codebooks"), r"codes of .* should be \(256, 32, 1\)"),
    ],
)
def test_configs_that_do_not_fit_the_tensors(changed, stored, words):
    with pytest.raises(ModelError, match=words):
        load(changed(stored=stored))


def test_names_of_dense_modules_in_both_dialects(changed, checkpoint):
    for names in (["lm_head"], None):  # and without any, since the tensors say it too
        plain = changed(stored=lambda stored, names=names: stored.update(linear_weights_not_to_quantize=names))
        assert torch.equal(load(plain).logits(TOKENS), load(checkpoint).logits(TOKENS))


def test_tensors_that_transformers_leaves_out_too(changed, checkpoint):
    """Older checkpoints have the rotary frequencies, which follow from the config."""
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)}
    assert torch.equal(load(changed(lambda found: found.update(extra))).logits(TOKENS), load(checkpoint).logits(TOKENS))


def test_another_method_and_contradictions_are_refused(changed, checkpoint):
    with pytest.raises(CheckpointConflict, match="requested 1, stored 2"):
        load(checkpoint, num_codebooks=1)
    other = changed(stored=lambda stored: stored.update(quant_method="gptq"))
    with pytest.raises(CheckpointConflict, match="quantized already with 'gptq'"):
        load(other)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("odd", r"layers\.0\.self_attn\.q_proj has in_features 90, which groups of 8 do not divide"),
        ("mixtral", r"layers\.0\.mlp\.experts\.gate_up_proj holds the experts of a layer in one tensor"),
    ],
)
def test_unusual_models_are_refused_before_weights_are_read(folder, tmp_path, name, words):
    checkpoint = make(tiny_model(name, folder), tmp_path / "out")
    save_file({"nothing": torch.zeros(1)}, checkpoint / "model.safetensors")
    with pytest.raises(ConfigError, match=words):
        load(checkpoint)


def test_a_head_that_is_quantized_too(changed):
    """The config of such a checkpoint names no dense weights."""

    def quantize_head(tensors):
        from .checkpoints import quantize

        parts = quantize(tensors.pop("lm_head.weight"), 2, 8, 1, 8)
        tensors.update({f"lm_head.{key}": part for key, part in parts.items()})

    loaded = load(changed(quantize_head, lambda stored: stored.pop("linear_weights_not_to_quantize")))
    assert next(layer for layer in loaded.layers if layer.name == "lm_head.weight").quantized
    report = polyquant.verify(loaded, max_new_tokens=2)
    assert not [check for check in report.failures if check.name != "sample"]


def test_transformers_reads_what_is_saved(checkpoint, tmp_path):
    loaded = load(checkpoint, compute_dtype="float32")
    loaded.logits(TOKENS)
    loaded.save(tmp_path / "out")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(other.lm_head) is torch.nn.Linear
    own, theirs = loaded.model.state_dict(), other.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)


def test_nothing_is_printed_and_codes_stay_as_they_were(checkpoint, capfd):
    capfd.readouterr()
    loaded = load(checkpoint)
    codes = loaded.model.get_submodule(LAYER).codes.clone()
    loaded.logits(TOKENS[:2])
    loaded.logits(TOKENS)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(loaded.model.get_submodule(LAYER).codes, codes)


def test_adapters_get_the_gradients_of_the_dequantized_model(folder, checkpoint):
    twin = dense_twin(tiny_model("qwen2", folder), checkpoint)
    loaded = load(checkpoint)
    assert any(isinstance(module, QuantizedLinear) for module in loaded.model.modules())

    expected = adapter_gradients(twin, TOKENS[:5])
    found = adapter_gradients(loaded.backend.prepare_for_training(loaded), TOKENS[:5])
    assert found.keys() == {name for name in expected if "lora" in name}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.real
@pytest.mark.slow
def test_the_real_model_computes_what_its_checkpoint_says(tmp_path):
    path = resolve_dense("builtin:smollm2").path
    checkpoint = make(path, tmp_path / "out", books=4)
    loaded, twin = load(checkpoint), dense_twin(path, checkpoint)
    tokens = loaded.tokenizer(EVALUATION, add_special_tokens=False).input_ids[:160]
    with torch.inference_mode():
        expected = twin(torch.tensor([tokens])).logits[0]
    assert kl_divergence(expected, loaded.logits(tokens)).max() < 1e-5
    assert kl_divergence(expected[:5], loaded.logits(tokens[:5])).max() < 1e-5
