"""The autoawq backend beyond the conformance suite; in the environment that its card pins."""

import json
import shutil
import tomllib
from pathlib import Path

import polyquant
import pytest
import torch
from polyquant.errors import CheckpointConflict, ModelError
from polyquant.testing.models import tiny_model
from polyquant.testing.texts import CALIBRATION
from polyquant_autoawq.options import AutoawqOptions
from polyquant_autoawq.plugin import ISOLATED
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
    return polyquant.quantize(folder, "autoawq", out, device="cpu", group_size=64, calibration=CALIBRATION)


def dequantized(tensors, module, group_size):
    """(out, in) from the format's description: of eight columns, a word has those at ORDER from its lowest bits up."""
    shifts = 4 * torch.arange(8)
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])

    def unpack(words):
        codes = (words.unsqueeze(-1) >> shifts) & 15
        return codes[..., order].flatten(1).float()

    codes, zeros = unpack(tensors[f"{module}.qweight"]), unpack(tensors[f"{module}.qzeros"])
    groups = torch.arange(codes.shape[0]) // group_size
    return ((codes - zeros[groups]) * tensors[f"{module}.scales"].float()[groups]).T


def test_the_pins_are_those_of_the_development_environment():
    development = PROJECT["tool"]["polyquant"]["development"]
    assert list(ISOLATED.requirements) == development["dependencies"]
    assert list(ISOLATED.without_dependencies) == development["without-dependencies"]


def test_each_layer_multiplies_with_what_the_format_stands_for(checkpoint):
    from polyquant.memory.effective import effective_weight

    loaded, tensors = polyquant.load(checkpoint, "autoawq", device="cpu"), load_file(checkpoint / "model.safetensors")
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert len(modules) == 14
    for module in modules:
        wanted = dequantized(tensors, module, 64)
        found = effective_weight(loaded.model.get_submodule(module), wanted.shape[1])
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


def test_packed_layers_are_what_the_format_stands_for(checkpoint):
    """Bit for bit: the library itself rounds them to float16 in each pass."""
    loaded = polyquant.load(checkpoint, "autoawq", device="cpu", kernel="packed")
    tensors = load_file(checkpoint / "model.safetensors")
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert len(modules) == 14
    for module in modules:
        layer = loaded.model.get_submodule(module)
        agree("autoawq", "weights by definition", layer.dequantize(), dequantized(tensors, module, 64))
        assert layer.packed.scales.dtype == tensors[f"{module}.scales"].dtype == torch.float16
    assert all(check.passed for check in polyquant.verify(loaded, max_new_tokens=2).checks)


def test_the_search_for_scales_puts_the_weights_back():
    """The library's own does not on a CPU, and every layer of a real model is noise after it."""
    from awq.quantize.quantizer import AwqQuantizer
    from polyquant_autoawq._quantize import Quantizer

    def kept(kind):
        torch.manual_seed(0)
        block, inputs = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False)), torch.randn(4, 64)
        before = block[0].weight.detach().clone()
        search = kind.__new__(kind)
        search.w_bit, search.group_size, search.zero_point, search.duo_scaling = 4, 64, True, True
        search.max_chunk_memory, search.n_parallel_calib_samples = 2**30, None
        with torch.no_grad():
            search._compute_best_scale(
                inputs, before.abs().mean(0), inputs.abs().mean(0), block, [block[0]], block(inputs), {}
            )
        return torch.equal(block[0].weight, before)

    assert kept(Quantizer)
    assert not kept(AwqQuantizer)


@pytest.mark.parametrize(
    "stored",
    [
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM", "zero_point": True},
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True},
        {"quant_method": "awq", "bits": 4, "group_size": 64, "checkpoint_format": "gemm", "sym": False},
    ],
    ids=["autoawq", "transformers", "gptqmodel"],
)
def test_dialects_are_read(stored):
    assert AutoawqOptions.from_stored(stored) == AutoawqOptions(group_size=64)


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"version": "gemv"}, "its version is 'gemv', and 'gemm' is read"),
        ({"zero_point": False}, "no zero points"),
        ({"backend": "llm-awq"}, "written by llm-awq"),
        ({"bits": 3}, "bits"),
    ],
)
def test_what_the_library_does_not_run_is_refused(stored, words):
    with pytest.raises(ValueError, match=words):
        AutoawqOptions.from_stored(stored)


def test_damaged_and_foreign_checkpoints_are_refused(checkpoint, folder, tmp_path):
    with pytest.raises(CheckpointConflict, match="is dense, and autoawq loads quantized checkpoints only"):
        polyquant.load(folder, "autoawq")
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scales"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="layers.1.mlp.up_proj cannot be read: scales is missing"):
        polyquant.load(broken, "autoawq", device="cpu")
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["group_size"] = 32
    (broken / "config.json").write_text(json.dumps(config))
    save_file(load_file(checkpoint / "model.safetensors"), broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="of a layer .* should be"):
        polyquant.load(broken, "autoawq", device="cpu")
