"""Checkpoints that nvidia-modelopt exports are read as it means them, and ours are what its tensor classes make."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import polyquant
import pytest
import torch
from polyquant.errors import CheckpointConflict, ModelError
from polyquant.measure.quality.divergence import kl_divergence, top1_agreement
from polyquant.testing.checkpoints import adapter_gradients, assert_verified, changed_copy, replaced
from polyquant.testing.models import tiny_model
from polyquant_mx import formats
from polyquant_mx._modules import MxLinear
from polyquant_mx._quantize import quantized
from polyquant.testing.oracles import agree
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from .checkpoints import TOKENS

LAYER = "model.layers.1.mlp.down_proj"
SCHEMES = {"nvfp4": formats.NVFP4, "mxfp8": formats.MXFP8, "fp8-block": formats.FP8_BLOCK, "int4": formats.INT4}


def load(path, **options):
    return polyquant.load(path, "modelopt", device="cpu", **options)


@pytest.fixture(scope="session")
def made(folder):
    """The folder of what modelopt makes of the tiny llama."""
    dense, out = tiny_model("llama", folder), folder / "made"
    script = Path(__file__).with_name("modelopt_makes.py")
    ended = subprocess.run([sys.executable, script, dense, out], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for name in ("fp8", "channel", "int4"):
        for file in dense.glob("token*"):
            shutil.copy(file, out / name)
    return out


@pytest.mark.parametrize("kernel", ["library", "packed"])
@pytest.mark.parametrize(("name", "scheme"), [("fp8", "fp8"), ("channel", "fp8-channel"), ("int4", "int4")])
def test_exports_are_read_as_modelopt_means_them(made, folder, name, scheme, kernel):
    loaded = load(made / name, kernel=kernel)
    assert_verified(loaded)
    assert {layer.scheme for layer in loaded.initial_layers if layer.quantized} == {scheme}
    reference = load_file(made / f"{name}-reference.safetensors")
    assert len(reference) == 14
    for path, weight in reference.items():
        if name == "int4" and path.rpartition(".")[2] not in ("o_proj", "down_proj"):
            continue  # exporting gives layers with one input one pre_quant_scale, and rounds them again
        close = torch.isclose(loaded.model.get_submodule(path).dequantize(), weight, rtol=1e-6, atol=1e-9)
        assert int((~close).sum()) <= weight.numel() / 1e5  # its quantizer multiplies with the reciprocal: ties differ
    dense = AutoModelForCausalLM.from_pretrained(tiny_model("llama", folder), dtype=torch.float32)
    with torch.no_grad():
        expected = dense(torch.tensor([TOKENS])).logits[0]
    assert kl_divergence(expected, loaded.logits(TOKENS)).mean() < (0.4 if name == "int4" else 0.03)


def test_transformers_reads_modelopts_fp8_without_its_scales(made, folder):
    """A known fault of transformers 5.23: other weights, and only warnings. One that it mends fails here."""
    dense = AutoModelForCausalLM.from_pretrained(tiny_model("llama", folder), dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(made / "fp8", dtype=torch.float32)
    with torch.no_grad():
        expected, found = (model.eval()(torch.tensor([TOKENS])).logits[0] for model in (dense, theirs))
    ours = load(made / "fp8").logits(TOKENS)
    assert type(theirs.get_submodule(LAYER)) is torch.nn.Linear
    codes = load_file(made / "fp8" / "model.safetensors")[f"{LAYER}.weight"]
    assert torch.equal(theirs.get_submodule(LAYER).weight, codes.float())
    assert kl_divergence(expected, found).mean() > 0.5
    assert kl_divergence(expected, ours).mean() < 0.03
    assert top1_agreement(expected, ours).float().mean() > 0.9


def test_a_side_file_alone_says_how_it_is_quantized(made, tmp_path):
    path = shutil.copytree(made / "fp8", tmp_path / "side")
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    loaded = polyquant.load(path, device="cpu")
    assert loaded.backend.name == "modelopt"
    assert torch.equal(loaded.logits(TOKENS), load(made / "fp8").logits(TOKENS))


@pytest.mark.parametrize("name", ["even", "odd", "large", "block"])
def test_codes_and_scales_are_modelopts(made, name):
    tensors = load_file(made / "tensors.safetensors")
    weight, seen = tensors[f"{name}.weight"], 0
    for kind, scheme in SCHEMES.items():
        own = {key.removeprefix(f"{name}.{kind}."): tensor for key, tensor in tensors.items()
               if key.startswith(f"{name}.{kind}.")}  # fmt: skip
        if not own:
            continue
        seen += 1
        found = quantized(weight, scheme)
        for part in ("qweight", "scales", "outer_scale"):
            if part in own:
                assert torch.equal(found[part].view(torch.uint8), own[part].view(torch.uint8)), (kind, part)
        linear = torch.nn.Linear(*reversed(weight.shape), bias=False, device="meta")
        if "dense" in own:
            weight_here = MxLinear(linear, scheme, found).dequantize()
            for backend in {"modelopt", kind} - {"fp8-block", "int4"}:
                agree(backend, "nvidia-modelopt's dequantize", weight_here, own["dense"])
    assert seen == 2


@pytest.mark.parametrize("algo", ["NVFP4", "FP8", "MXFP8"])
def test_what_is_made_on_the_fly_is_the_quantized_weight(folder, tmp_path, algo):
    loaded = load(tiny_model("qwen2", folder), quant_algo=algo)
    assert_verified(loaded)
    saved = loaded.save(tmp_path / "out")
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["quant_algo"]) == ("modelopt", algo)
    again = load(saved)
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS)) and again.config == loaded.config
    with pytest.raises(CheckpointConflict):
        load(saved, quant_algo="W4A16_AWQ")


def test_formats_are_mixed(folder, tmp_path):
    loaded = load(tiny_model("llama", folder), quant_algo="NVFP4", layers={"down_proj": "FP8", "layers.0.mlp": "MXFP8"})
    assert_verified(loaded)
    saved = loaded.save(tmp_path / "out")
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == "MIXED_PRECISION"
    layers = config["quantized_layers"]
    assert layers["model.layers.1.mlp.down_proj"] == {"quant_algo": "FP8"}
    assert layers["model.layers.0.mlp.up_proj"] == {"quant_algo": "MXFP8", "group_size": 32}
    assert layers["model.layers.0.self_attn.q_proj"] == {"quant_algo": "NVFP4", "group_size": 16}
    again = load(saved)
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))
    schemes = {layer.name: layer.scheme for layer in again.initial_layers if layer.quantized}
    assert schemes == {layer.name: layer.scheme for layer in loaded.initial_layers if layer.quantized}
    assert sorted(set(schemes.values())) == ["fp8", "mxfp8", "nvfp4"]


def test_adapters_get_the_gradients_of_the_decoded_model(made):
    loaded = load(made / "int4", kernel="library")
    twin = AutoModelForCausalLM.from_pretrained(tiny_model("llama", made.parent), dtype=torch.float32)
    for name, module in loaded.model.named_modules():
        if isinstance(module, MxLinear):
            twin.get_submodule(name).weight.data = module.dequantize()
    twin.load_state_dict(
        {name: tensor for name, tensor in loaded.model.state_dict().items() if "norm" in name}, strict=False
    )
    expected = adapter_gradients(twin, TOKENS)
    found = adapter_gradients(loaded.backend.prepare_for_training(loaded), TOKENS)
    assert found.keys() == {name for name in expected if "lora" in name}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def nvfp4(folder):
    return load(tiny_model("llama", folder), quant_algo="NVFP4").save(folder / "nvfp4")


def test_scales_to_divide_by_are_refused(nvfp4, tmp_path):
    """compressed-tensors' weight_global_scale in the place of ModelOpt's weight_scale_2."""
    change = partial(changed_copy, nvfp4, tmp_path)
    name = f"{LAYER}.weight_scale_2"
    with pytest.raises(ModelError, match=rf"{LAYER} cannot be read: weight_scale_2 is .* divided by; this one is no"):
        load(change(replaced(name, lambda scale: 1 / scale)))
    with pytest.raises(ModelError, match="weight_global_scale has no place|weight_scale_2 is missing"):
        load(change(lambda tensors: tensors.update({f"{LAYER}.weight_global_scale": 1 / tensors.pop(name)})))


def test_scales_of_the_key_value_cache_are_said(nvfp4, tmp_path):
    names = [f"model.layers.0.self_attn.{one}" for one in ("k_proj.k_scale", "v_proj.v_scale")]
    path = changed_copy(nvfp4, tmp_path, lambda tensors: tensors.update({name: torch.ones(1) for name in names}))
    loaded = load(path)
    assert any("2 scales of a quantized key-value cache are not used" in note for note in loaded.notes)
    assert torch.equal(loaded.logits(TOKENS), load(nvfp4).logits(TOKENS))


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"quant_algo": "NVFP4_SVD"}, "its quant_algo is NVFP4_SVD; FP8, .* are read"),
        ({"quant_algo": "MIXED_PRECISION"}, "its quant_algo is MIXED_PRECISION without quantized_layers"),
        ({"has_zero_point": True}, "its has_zero_point is True"),
        ({"rotation": 1}, "it has rotation, which is not read"),
    ],
)
def test_configs_that_are_not_read(nvfp4, tmp_path, stored, words):
    with pytest.raises(ModelError, match=words):
        load(changed_copy(nvfp4, tmp_path, stored=lambda found: found.update(stored)))


def test_formats_that_contradict_their_tensors_are_refused(nvfp4, tmp_path):
    path = changed_copy(nvfp4, tmp_path, stored=lambda found: found.update(quant_algo="FP8"))
    with pytest.raises(ModelError, match=r"cannot be read: .*weight_scale_2"):
        load(path)


def test_the_backend_nvfp4_writes_the_same_file(folder, tmp_path):
    path = tiny_model("llama", folder)
    one, other = (polyquant.load(path, name, device="cpu").save(tmp_path / name) for name in ("nvfp4", "modelopt"))
    mine, theirs = (load_file(each / "packed.safetensors") for each in (one, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name].float(), theirs[name].float()) for name in mine)
    loaded = polyquant.load(one, device="cpu")
    assert loaded.backend.name == "modelopt"
    fp8 = load(path, quant_algo="FP8").save(tmp_path / "fp8")
    with pytest.raises(ModelError, match="the backend modelopt reads it"):
        polyquant.load(fp8, "nvfp4", device="cpu")
