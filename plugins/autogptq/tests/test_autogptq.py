"""The autogptq backend beyond the conformance suite; in the environment that its card pins."""

import json
import shutil
import tomllib
from pathlib import Path

import polyquant
import pytest
import torch
from polyquant.errors import CheckpointConflict, ModelError
from polyquant.models.resolve import resolve
from polyquant.testing.models import tiny_model
from polyquant.testing.texts import CALIBRATION
from polyquant_autogptq.options import AutogptqOptions
from polyquant_autogptq.plugin import ISOLATED
from polyquant.testing.oracles import agree
from safetensors.torch import load_file, save_file

TOKENS = list(range(3, 40))
PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model("qwen2", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    return polyquant.quantize(folder, "autogptq", out, device="cpu", group_size=64, calibration=CALIBRATION)


def dequantized(tensors, module, group_size):
    """(out, in) from the format's description; zero points are stored less one."""
    shifts = 4 * torch.arange(8)
    codes = ((tensors[f"{module}.qweight"].unsqueeze(1) >> shifts[:, None]) & 15).flatten(0, 1).float()
    zeros = (((tensors[f"{module}.qzeros"].unsqueeze(-1) >> shifts) & 15) + 1).flatten(1).float()
    groups = tensors[f"{module}.g_idx"].long()
    return ((codes - zeros[groups]) * tensors[f"{module}.scales"].float()[groups]).T


def test_the_pins_are_those_of_the_development_environment():
    development = PROJECT["tool"]["polyquant"]["development"]
    assert list(ISOLATED.requirements) == development["dependencies"]
    assert list(ISOLATED.without_dependencies) == development["without-dependencies"]


def test_each_layer_multiplies_with_what_the_format_stands_for(checkpoint):
    from polyquant.memory.effective import effective_weight

    loaded, tensors = polyquant.load(checkpoint, "autogptq", device="cpu"), load_file(checkpoint / "model.safetensors")
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert len(modules) == 14
    for module in modules:
        wanted = dequantized(tensors, module, 64)
        found = effective_weight(loaded.model.get_submodule(module), wanted.shape[1])
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("order", [False, True], ids=["", "act-order"])
def test_packed_layers_are_what_the_format_stands_for(folder, tmp_path, order):
    """Bit for bit, scales in the dtype that they are stored in."""
    path = polyquant.quantize(
        folder, "autogptq", tmp_path / "out", device="cpu", group_size=32, desc_act=order, calibration=CALIBRATION
    )
    loaded, tensors = (
        polyquant.load(path, "autogptq", device="cpu", kernel="packed"),
        load_file(path / "model.safetensors"),
    )
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert len(modules) == 14
    for module in modules:
        layer = loaded.model.get_submodule(module)
        agree("autogptq", "weights by definition", layer.dequantize(), dequantized(tensors, module, 32))
        assert layer.packed.scales.dtype == tensors[f"{module}.scales"].dtype
        assert layer.packed.format.ordered == order
    assert all(check.passed for check in polyquant.verify(loaded, max_new_tokens=2).checks)


def test_a_zero_point_that_is_stored_as_all_ones_is_the_librarys(checkpoint, tmp_path):
    """Its layers without reordered columns read 0 there, those with them 16."""
    path = shutil.copytree(checkpoint, tmp_path / "copy")
    tensors = load_file(path / "model.safetensors")
    module = "model.layers.0.mlp.up_proj"
    tensors[f"{module}.qzeros"][0, 0] = -1
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["sym"] = False
    (path / "config.json").write_text(json.dumps(config))
    if (path / "quantize_config.json").exists():
        (path / "quantize_config.json").unlink()
    packed, library = (
        polyquant.load(path, "autogptq", device="cpu", kernel=kernel).model.get_submodule(module)
        for kernel in ("packed", "library")
    )
    with torch.inference_mode():
        identity = torch.eye(256)
        torch.testing.assert_close(packed.dequantize().T, library(identity), rtol=1e-5, atol=1e-6)


def test_it_quantizes_on_a_cpu_and_puts_its_device_back(checkpoint, folder):
    from auto_gptq.modeling import _base
    from polyquant.loading import dense

    assert _base.CUDA_0 == torch.device("cuda:0")
    dense = dense.load_dense(resolve(folder))
    with torch.inference_mode():
        wanted = dense(torch.tensor([TOKENS])).logits[0]
    found = polyquant.load(checkpoint, "autogptq", device="cpu").logits(TOKENS)
    assert (
        torch.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.85
    )  # 0.90: the library rounds worse than others


@pytest.mark.parametrize(
    "stored",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True},
        {"quant_method": "gptq", "wbits": 4, "groupsize": 64},
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "gptq", "sym": True},
    ],
    ids=["auto-gptq", "old", "gptqmodel"],
)
def test_dialects_are_read(stored):
    assert AutogptqOptions.from_stored(stored) == AutogptqOptions(group_size=64)


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"bits": 4, "checkpoint_format": "gptq_v2"}, "its format is 'gptq_v2', and 'gptq' is read"),
        ({"bits": 4, "is_marlin_format": True}, "Marlin"),
        ({"bits": 4, "dynamic": {"layers.0": {"bits": 8}}}, "different options"),
        ({"bits": 5}, "bits"),
        ({}, "bits"),
    ],
)
def test_what_the_library_does_not_know_is_refused(stored, words):
    with pytest.raises(ValueError, match=words):
        AutogptqOptions.from_stored(stored)


def test_it_leaves_no_layer_of_a_block_dense(folder, tmp_path):
    with pytest.raises(polyquant.errors.ConfigError, match="auto-gptq quantizes all layers of a block"):
        polyquant.quantize(folder, "autogptq", tmp_path / "out", device="cpu", skip=("down_proj",), group_size=64)


def test_damaged_and_foreign_checkpoints_are_refused(checkpoint, folder, tmp_path):
    with pytest.raises(CheckpointConflict, match="is dense, and autogptq loads quantized checkpoints only"):
        polyquant.load(folder, "autogptq")
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scales"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="layers.1.mlp.up_proj cannot be read: scales is missing"):
        polyquant.load(broken, "autogptq", device="cpu")
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["group_size"] = 32
    (broken / "config.json").write_text(json.dumps(config))
    save_file(load_file(checkpoint / "model.safetensors"), broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="of a layer .* should be"):
        polyquant.load(broken, "autogptq", device="cpu")
