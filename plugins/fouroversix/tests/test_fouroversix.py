"""Four Over Six on small models: agreement with the library, checkpoints, damage, training, the environment check."""

import pytest
import torch
from fouroversix import (
    FourOverSixLinear,
    ModuleQuantizationConfig,
    QuantizationConfig,
    QuantizeBackend,
    quantize_to_fp4,
)
from fouroversix import dequantize as dequantize_by_library
from polyquant.packed_weights import bands
from polyquant.support import libraries
from polyquant.errors import ConfigError
from polyquant.measure.quality.divergence import kl_divergence, top1_agreement
from polyquant.testing.checkpoints import assert_verified
from polyquant.testing.models import tiny_model
from polyquant.testing.reference import reference_logits
from polyquant.testing.texts import EVALUATION
from polyquant_fouroversix import _decode, _library
from polyquant_fouroversix._layers import quantize_linear
from polyquant_fouroversix.formats import RULES
from polyquant_fouroversix._modules import FouroversixLinear
from polyquant_fouroversix.options import FouroversixOptions
from polyquant_fouroversix.plugin import backend
from polyquant.testing.oracles import agree
from transformers import AutoModelForCausalLM

from .conftest import LAYER, TOKENS, load


FORMATS = [(dtype, rule) for dtype, rules in RULES.items() for rule in rules]


PLAIN = {"nvfp4": "mse", "mxfp4": "static_6", "if4": "mse", "nvint4": "static_6"}


def logits(model, tokens=TOKENS):
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float()


def by_library(weight, config):
    """A weight as the library's quantizer in torch packs it, all rows at once."""
    options = QuantizationConfig(
        backend=QuantizeBackend.pytorch, block_scale_2d=config.weight_scale_2d, dtype=config.dtype,
        scale_rule=config.scale_rule,
    )  # fmt: skip
    return quantize_to_fp4(weight, options)


def weight_of(layer):
    return torch.cat(list(layer.pieces()))


def dense_twin(path, loaded):
    """The dense model of the weights that the packed ones stand for."""
    model = AutoModelForCausalLM.from_pretrained(path)
    for name, module in loaded.model.named_modules():
        if isinstance(module, FouroversixLinear):
            model.get_submodule(name).weight.data = weight_of(module)
    return model


def library_linear(linear, config):
    """The library's own layer, in float32 on its PyTorch path."""
    module = ModuleQuantizationConfig(
        dtype=config.dtype,
        scale_rule=config.scale_rule,
        weight_scale_2d=config.weight_scale_2d,
        output_dtype="float32",
        quantize_backend="pytorch",
        matmul_backend="pytorch",
    )
    theirs = FourOverSixLinear(linear, module)
    for name, tensor in theirs.get_quantized_parameters("weight", linear.weight.detach()).items():
        setattr(theirs, name, torch.nn.Parameter(tensor, requires_grad=False))
    return theirs


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "nvfp6_e2m3"}, "dtype must be 'nvfp4', 'mxfp4', 'if4' or 'nvint4', got 'nvfp6_e2m3'"),
        ({"dtype": "mxfp4"}, "scale_rule of mxfp4 must be 'static_6' or 'static_4', got 'mse'"),
        ({"dtype": "if4", "scale_rule": "static_6"}, "scale_rule of if4 must be 'mse' or 'mae' or 'abs_max'"),
        ({"dtype": "nvint4"}, "scale_rule of nvint4 must be 'static_6', got 'mse'"),
        ({"dtype": "if4", "weight_scale_2d": True}, "weight_scale_2d is for nvfp4, not if4"),
        ({"scale_rule": "static6"}, "scale_rule must be .*got 'static6'. Did you mean 'static_6'"),
        ({"keep_master_weights": True}, "unknown option 'keep_master_weights'"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        load("nowhere", **options)


@pytest.mark.parametrize("dtype_of_weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 64), (300, 90), (30, 200)])
@pytest.mark.parametrize(
    ("dtype", "rule", "square"),
    [(*each, False) for each in FORMATS] + [("nvfp4", rule, True) for rule in RULES["nvfp4"]],
)
def test_bands_of_rows_are_packed_as_all_rows_are(monkeypatch, dtype, rule, square, shape, dtype_of_weights):
    monkeypatch.setitem(bands.BAND_WEIGHTS, "cpu", 2**8)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype_of_weights)
    config = FouroversixOptions(dtype=dtype, scale_rule=rule, weight_scale_2d=square)
    ours, theirs = _library.quantize(weight, config), by_library(weight, config)
    assert torch.equal(ours["weight"], theirs.values)
    assert torch.equal(ours["scales"].view(torch.uint8), theirs.scale_factors.view(torch.uint8))
    assert torch.equal(ours["amax"], theirs.amax.float().reshape(1))


@pytest.mark.parametrize("chunk", [2**18, 2**8])
@pytest.mark.parametrize("shape", [(128, 64), (203, 90), (30, 200)])
@pytest.mark.parametrize(("dtype", "rule"), FORMATS)
def test_weights_are_those_that_the_library_dequantizes(monkeypatch, dtype, rule, shape, chunk):
    monkeypatch.setitem(_decode.CHUNK_WEIGHTS, "cpu", chunk)
    linear = torch.nn.Linear(shape[1], shape[0])
    linear.weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    linear.weight.data[:20] = 0
    config = FouroversixOptions(dtype=dtype, scale_rule=rule)
    weight = weight_of(quantize_linear(linear, config))
    theirs = dequantize_by_library(by_library(linear.weight.detach(), config), torch.float32)
    # the library multiplies IF4 blocks in float16
    torch.testing.assert_close(weight, theirs, rtol=2e-3 if dtype == "if4" else 1e-6, atol=0)
    agree("fouroversix", "fouroversix's dequantize", weight, theirs, allowed=2e-3)
    assert not weight[:20].any()
    assert (weight - linear.weight).norm() / linear.weight.norm() < 0.16


@pytest.mark.parametrize(
    ("dtype", "rule", "square"),
    [(*each, False) for each in FORMATS] + [("nvfp4", rule, True) for rule in RULES["nvfp4"]],
)
def test_a_layer_answers_as_that_of_the_library(dtype, rule, square):
    linear = torch.nn.Linear(100, 70)
    generator = torch.Generator().manual_seed(1)
    linear.weight.data.normal_(std=0.1, generator=generator)
    config = FouroversixOptions(dtype=dtype, scale_rule=rule, weight_scale_2d=square)
    ours, theirs = quantize_linear(linear, config), library_linear(linear, config)
    for count in (1, 5):
        x = torch.randn(2, count, 100, generator=generator)
        x[0, 0, :64] = 0  # whole blocks of zeros
        with torch.inference_mode():
            found, expected = ours(x), theirs(x)
        assert found.shape == (2, count, 70)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3 if dtype == "if4" else 1e-5)
    dense = torch.nn.functional.linear(x, weight_of(ours), linear.bias)
    assert (found - dense).abs().max() > 1e-3  # activations are rounded too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_s_activations_are_the_library_s_bit_for_bit(dtype):
    """Which the core rounds, as for every backend."""
    x = torch.randn(64, 100, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 2, 64)[:, None]
    x[3, :64] = 0
    x[4, :32] = 6 * torch.tensor([1, 1 + 2**-23, 1 - 2**-24, 0.25] * 8)  # powers of two times 6, and the next numbers
    x[5, :32] = torch.tensor([6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25] * 4)  # ties
    config = FouroversixOptions(dtype="mxfp4", scale_rule="static_6")
    assert torch.equal(_decode.rounded(x.to(dtype), config), _decode.by_library(x.to(dtype), config))


@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize("model", ["qwen2", "llama-tied", "odd"])
def test_logits_are_those_of_the_dequantized_weights(folder, tmp_path, model, dtype):
    path = tiny_model(model, folder)
    loaded = load(path, dtype=dtype, scale_rule=PLAIN[dtype], quantize_activations=False)
    assert loaded.kernel == "torch dequantize and matmul"
    twin = dense_twin(path, loaded)
    for count in (1, 8):
        torch.testing.assert_close(loaded.logits(TOKENS[:count]), logits(twin, TOKENS[:count]), rtol=1e-4, atol=1e-4)
    assert_verified(loaded)
    again = load(loaded.save(tmp_path / "out"))
    assert again.config == loaded.config
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_compute_dtypes(folder, tmp_path, dtype):
    path = tiny_model("qwen2", folder)
    loaded = load(path, compute_dtype=dtype, quantize_activations=False)
    assert_verified(loaded)
    difference = kl_divergence(logits(dense_twin(path, loaded)), loaded.logits(TOKENS)).max()
    assert 0 < difference < 0.05
    again = load(loaded.save(tmp_path / "out"))
    assert again.config == loaded.config
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))
    assert load(path, compute_dtype=dtype).logits(TOKENS).isfinite().all()


def test_activations_are_chosen_at_load(checkpoint):
    rounded, plain = load(checkpoint), load(checkpoint, quantize_activations=False)
    assert (rounded.config.quantize_activations, plain.config.quantize_activations) == (True, False)
    assert rounded.kernel == "torch dequantize and matmul, activations rounded to nvfp4"
    assert not torch.equal(rounded.logits(TOKENS), plain.logits(TOKENS))
    assert {layer.kernel for layer in plain.layers if layer.quantized} == {plain.kernel}


def test_transformers_reads_what_is_saved_and_what_it_saves_is_read(folder, tmp_path):
    """Where padding changes no size: it refuses other layers."""
    loaded = load(tiny_model("llama", folder))
    theirs = AutoModelForCausalLM.from_pretrained(loaded.save(tmp_path / "ours"), dtype=torch.float32)
    assert type(theirs.get_submodule(LAYER)) is FourOverSixLinear
    torch.testing.assert_close(logits(theirs), loaded.logits(TOKENS), rtol=1e-3, atol=1e-3)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded.tokenizer.save_pretrained(tmp_path / "theirs")
    again = load(tmp_path / "theirs")
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))
    assert_verified(again)
    dense = {layer.name for layer in again.layers if layer.role in ("linear", "head") and not layer.quantized}
    assert dense == {"lm_head.weight"}


def test_skip_and_a_quantized_head(folder, tmp_path):
    path = tiny_model("llama", folder)
    loaded = load(path, skip=("down_proj",), skip_defaults=False)
    dense = {layer.name for layer in loaded.layers if layer.role in ("linear", "head") and not layer.quantized}
    assert dense == {f"model.layers.{index}.mlp.down_proj.weight" for index in range(2)}
    again = load(loaded.save(tmp_path / "out"))
    assert again.config == loaded.config
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))
    assert_verified(again)


def test_progress_is_drawn_only_where_asked(folder, capfd):
    path = tiny_model("llama", folder)
    capfd.readouterr()
    load(path).logits(TOKENS)
    assert capfd.readouterr() == ("", "")
    load(path, progress=True)
    assert "Quantizing" in capfd.readouterr().err


def test_adapters_get_the_gradients_of_the_dequantized_model(folder):
    from peft import LoraConfig, get_peft_model

    path = tiny_model("qwen2", folder)
    loaded = load(path, quantize_activations=False)
    twin = dense_twin(path, loaded)

    def gradients(model):
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                assert parameter.dtype == torch.float32
                parameter.data.normal_(std=0.1, generator=generator)
        model.train()
        ids = torch.tensor([TOKENS])
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}

    expected = gradients(twin)
    found = gradients(loaded.backend.prepare_for_training(loaded))
    assert found.keys() == {name for name in expected if "lora" in name}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4)


def test_the_gradient_passes_rounded_activations_straight_through():
    layer = quantize_linear(torch.nn.Linear(100, 70), FouroversixOptions())
    x, gradient = torch.randn(3, 100, requires_grad=True), torch.randn(3, 70)
    layer(x).backward(gradient)
    torch.testing.assert_close(x.grad, gradient @ weight_of(layer))


def test_the_fix_of_a_missing_library_is_the_command_that_works(monkeypatch):
    installed = libraries.installed_version
    missing = lambda name: None if name == "fouroversix" else installed(name)  # noqa: E731
    monkeypatch.setattr(libraries, "installed_version", missing)
    (problem,) = backend.validate_environment("cpu")
    assert problem.what == "fouroversix is not installed"
    assert "SKIP_CUDA_BUILD=1 FORCE_BUILD=1 pip install --no-build-isolation 'fouroversix>=1.0.5,<1.1'" in problem.fix


@pytest.mark.real
def test_weights_alone_stay_closer_to_the_real_model():
    loaded = load("builtin:smollm2", quantize_activations=False)
    tokens = loaded.tokenizer(EVALUATION, add_special_tokens=False).input_ids[:160]
    reference, found = reference_logits("builtin:smollm2", tokens), loaded.logits(tokens)
    assert kl_divergence(reference, found).mean() < 0.26  # measured: 0.203; 0.314 with rounded activations
    assert top1_agreement(reference, found).float().mean() > 0.72  # measured: 0.794
