"""FP8 on small models: numbers and bytes, checkpoints of other writers, damage, training, other readers."""

import polyquant
import pytest
import torch
from polyquant.errors import ConfigError
from polyquant.measure.quality.divergence import kl_divergence
from polyquant.plugin import layers
from polyquant.testing.checkpoints import assert_verified
from polyquant.testing.models import tiny_model
from polyquant_fp8._decode import E4M3, dequantize, quantize
from polyquant_fp8._modules import Fp8Linear
from polyquant.testing.oracles import agree
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from .conftest import LAYER, load


TOKENS = [3, 4, 5, 6, 7, 8, 9, 10]


FORMATS = {
    "block128": {},
    "ue8m0": {"scale_fmt": "ue8m0"},
    "tensor": {"block_rows": 0, "block_columns": 0},
    "uneven": {"block_rows": 48, "block_columns": 20},
}


def logits(model, tokens=TOKENS):
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float()


def defined(weight, scales, block):
    """The definition: every weight times the scale of its block."""
    if block is None:
        return weight.float() * scales.float()
    rows = torch.arange(weight.shape[0]) // block[0]
    columns = torch.arange(weight.shape[1]) // block[1]
    return weight.float() * scales.float()[rows[:, None], columns]


def dense_twin(path, loaded):
    """The dense model of the weights that the packed ones stand for."""
    model = AutoModelForCausalLM.from_pretrained(path)
    for name, module in loaded.model.named_modules():
        if isinstance(module, Fp8Linear):
            numbers = defined(module.weight, module.scales, module.block)
            model.get_submodule(name).weight.data = numbers.detach()
    return model


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_rows": 0}, "block_rows and block_columns are both 0"),
        ({"block_rows": -1}, "block_rows must be"),
        ({"scale_fmt": "ue8m0", "block_rows": 0, "block_columns": 0}, "'ue8m0' is for blocks"),
        ({"scale_fmt": "e8m0"}, "scale_fmt must be 'float' or 'ue8m0', got 'e8m0'"),
        ({"weight_block_size": 128}, "unknown option 'weight_block_size'"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        load("nowhere", **options)


def test_every_code_is_read_exactly():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(1, -1).view(E4M3)
    for scale in (1.0, 2.0**-20, 0.1, 1e30):
        expected = codes.float() * scale
        assert torch.equal(dequantize(codes, torch.tensor(scale), None), expected)


@pytest.mark.parametrize("block", [None, (128, 128), (48, 20), (1, 90), (500, 500)])
@pytest.mark.parametrize("shape", [(256, 512), (203, 90)])
def test_blocks(shape, block):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1
    weight[:48] = 0
    packed, scales = quantize(weight, block)
    numbers = dequantize(packed, scales, block)
    assert torch.equal(numbers, defined(packed, scales, block))
    assert not numbers[:48].any()
    # three bits of mantissa: at most 1/16 of a number, or half a step of the subnormal ones
    greatest = weight.abs().max() / 448
    assert ((numbers - weight).abs() <= weight.abs() / 16 + greatest * 2**-10).all()


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_bytes_are_those_of_transformers(scale_fmt):
    class Quantizer:
        quantization_config = FineGrainedFP8Config(scale_fmt=scale_fmt)

    weight = torch.randn((256, 512), generator=torch.Generator().manual_seed(0)) * 0.1
    weight[128:, :128] = 0
    theirs = Fp8Quantize(Quantizer()).convert({"a.weight": weight})
    packed, scales = quantize(weight, (128, 128), powers_of_two=scale_fmt == "ue8m0")
    assert torch.equal(packed.view(torch.uint8), theirs["a.weight"].view(torch.uint8))
    assert scales.dtype == theirs["a.weight_scale_inv"].dtype
    assert torch.equal(scales.float(), theirs["a.weight_scale_inv"].float())
    numbers = Fp8Dequantize(Quantizer())._dequantize_one(packed, scales, torch.float32)
    agree("fp8", "transformers' Fp8Dequantize", dequantize(packed, scales, (128, 128)), numbers)


@pytest.mark.parametrize("chunk", [2**20, 2**12])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("model", ["qwen2", "llama-tied", "odd"])
def test_logits_are_those_of_the_dequantized_weights(folder, tmp_path, monkeypatch, model, name, chunk):
    monkeypatch.setitem(layers.CHUNK_WEIGHTS, "cpu", chunk)
    path = tiny_model(model, folder)
    loaded = load(path, **FORMATS[name])
    twin = dense_twin(path, loaded)
    for count in (1, 8):
        expected = logits(twin, TOKENS[:count])
        torch.testing.assert_close(loaded.logits(TOKENS[:count]), expected, rtol=1e-4, atol=1e-4)
    assert_verified(loaded)
    again = load(loaded.save(tmp_path / "out"))
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))
    assert "activations stay in float32" in again.notes[0]
    assert not loaded.notes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_compute_dtypes(folder, tmp_path, dtype):
    path = tiny_model("qwen2", folder)
    loaded = load(path, compute_dtype=dtype)
    assert_verified(loaded)
    difference = kl_divergence(logits(dense_twin(path, loaded)), loaded.logits(TOKENS)).max()
    assert 0 < difference < 0.05
    assert loaded.model.get_submodule(LAYER).weight_scale_inv.dtype == torch.float32
    again = load(loaded.save(tmp_path / "out"))
    assert again.config == loaded.config
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))


def test_transformers_reads_what_is_saved(checkpoint):
    """Dense: there is no GPU, so it dequantizes."""
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert type(theirs.get_submodule(LAYER)) is torch.nn.Linear
    torch.testing.assert_close(logits(theirs), load(checkpoint).logits(TOKENS), rtol=1e-4, atol=1e-4)


def as_bytes(tensors):
    """Scales as powers of two in plain bytes, as MXFP8 checkpoints have them."""
    for name in [name for name in tensors if name.endswith("weight_scale_inv")]:
        tensors[name] = tensors[name].log2().ceil().add(127).to(torch.uint8)


def with_activation_scales(tensors):
    for name in [name for name in tensors if name.endswith("weight_scale_inv")]:
        tensors[name.replace("weight_scale_inv", "activation_scale")] = torch.tensor(0.02)


def in_bfloat16(tensors):
    for name in [name for name in tensors if name.endswith("weight_scale_inv")]:
        tensors[name] = tensors[name].bfloat16()


@pytest.mark.parametrize(
    ("tensors", "stored"),
    [
        (lambda tensors: None, lambda stored: stored.update(fmt="e4m3")),
        (lambda tensors: None, lambda stored: stored.update(fmt="float8_e4m3fn", dequantize=False)),
        (
            lambda tensors: None,
            lambda stored: stored.update(ignored_layers=["lm_head"], modules_to_not_convert=None),
        ),
        (in_bfloat16, lambda stored: None),
        (as_bytes, lambda stored: stored.update(scale_fmt="ue8m0")),
        (with_activation_scales, lambda stored: stored.update(activation_scheme="static")),
    ],
)
def test_checkpoints_of_other_writers(folder, changed, tmp_path, tensors, stored):
    path = changed(tensors, stored)
    loaded = load(path)
    assert_verified(loaded)
    expected = logits(dense_twin(tiny_model("qwen2", folder), loaded))
    torch.testing.assert_close(loaded.logits(TOKENS), expected, rtol=1e-4, atol=1e-4)
    again = load(loaded.save(tmp_path / "again"))
    assert again.config == loaded.config
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))
    written, read = load_file(tmp_path / "again" / "model.safetensors"), load_file(path / "model.safetensors")
    assert written.keys() == read.keys()


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


@pytest.mark.parametrize("chunk", [2**20, 2**12])
def test_adapters_get_the_gradients_of_the_dequantized_model(folder, monkeypatch, chunk):
    from peft import LoraConfig, get_peft_model

    monkeypatch.setitem(layers.CHUNK_WEIGHTS, "cpu", chunk)
    path = tiny_model("qwen2", folder)
    loaded = load(path)
    twin = dense_twin(path, loaded)

    def gradients(model):
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora" in name:  # PEFT rounds the first values of adapters to the dtype of the base
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


def test_adapters_are_of_float32_and_not_rounded_to_the_weights_dtype(folder):
    from peft import LoraConfig, get_peft_model

    loaded = polyquant.load(tiny_model("llama", folder), "fp8", device="cpu")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(loaded.backend.prepare_for_training(loaded), config)
    model.add_adapter("second", config)
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="linear")
    adapters = [tensor.detach() for name, tensor in model.named_parameters() if "lora_" in name]
    assert len(adapters) == 3 * 2 * 2
    assert {tensor.dtype for tensor in adapters} == {torch.float32}
    assert not any(torch.equal(tensor, tensor.to(E4M3).float()) for tensor in adapters)
