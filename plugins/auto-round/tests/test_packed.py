"""kernel="packed" on checkpoints of each layout, made by auto-round: weights by the formats' formulas, bit for bit."""

import shutil

import polyquant
import pytest
import torch
from polyquant.errors import ModelError
from polyquant.testing.checkpoints import assert_verified
from polyquant_auto_round import _kernels
from polyquant.testing.oracles import agree
from safetensors.torch import load_file, save_file

TOKENS = [3, 4, 5, 6, 7, 8, 9]
AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # of eight columns in a word
MADE = {
    "int4": {"model": "qwen2"},
    "int4-row": {"group_size": -1},
    "uint4": {"sym": False, "group_size": 32},
    "int8": {"bits": 8},
    "gptq": {"format": "auto_gptq", "sym": False},
    "awq": {"format": "auto_awq", "model": "qwen2"},
}


def load(path, **options):
    return polyquant.load(path, "auto-round", device="cpu", **options)


def code(words, bits, place):
    """Codes at `place` of int32 words, as int64."""
    return (words.long() >> (bits * place)) & (2**bits - 1)


def by_formula(parts, config, *, awq, less_one):
    """The weight of a layer, (out_features, in_features), of its stored tensors."""
    held = 32 // config.bits
    places = AWQ_NIBBLES if awq else range(held)
    zeros = torch.stack([code(parts["qzeros"], config.bits, place) for place in places], -1).flatten(1) + less_one
    if awq:
        codes = torch.stack([code(parts["qweight"], 4, place) for place in places], -1).flatten(1)
    else:
        codes = torch.stack([code(parts["qweight"], config.bits, place) for place in places], 1).flatten(0, 1)
    groups = torch.arange(len(codes)) // (len(codes) if config.group_size == -1 else config.group_size)
    return (parts["scales"].float()[groups] * (codes - zeros[groups])).T


@pytest.mark.parametrize("name", MADE)
def test_weights_are_those_of_the_checkpoint(made, name):
    path = made(**MADE[name])
    loaded, tensors = load(path, kernel="packed"), load_file(path / "model.safetensors")
    quantized = [layer for layer in loaded.layers if layer.quantized]
    assert quantized
    for layer in quantized:
        assert layer.kernel.startswith("packed")
        home = layer.name.rpartition(".")[0]
        parts = {part: tensors[f"{home}.{part}"] for part in ("qweight", "qzeros", "scales")}
        awq = parts["qweight"].shape[0] == layer.shape[1]
        weight = by_formula(parts, loaded.config, awq=awq, less_one=not awq)
        agree("auto-round", "weights by definition", loaded.model.get_submodule(home).dequantize(), weight)
        assert loaded.model.get_submodule(home).packed.scales.dtype == parts["scales"].dtype
    assert_verified(loaded)


def test_layers_of_few_bits_stay_with_the_library_and_train(made):
    """Three bits in plain torch; two with auto-round-lib, whose product has no gradient of its own."""
    for bits in (2, 3):
        path = made(bits=bits)
        loaded = load(path, kernel="packed")
        assert not [layer for layer in loaded.layers if layer.kernel.startswith("packed")]
        assert any("the library multiplies with" in note for note in loaded.notes)
        assert_verified(loaded)
        library = load(path, kernel="library", compute_dtype="float32")
        torch.testing.assert_close(loaded.logits(TOKENS), library.logits(TOKENS), rtol=1e-4, atol=1e-4)
        inputs = torch.randn(2, 256, requires_grad=True)
        loaded.backend.prepare_for_training(loaded).get_submodule("model.layers.0.mlp.up_proj")(inputs).sum().backward()
        assert inputs.grad is not None
        assert bool(inputs.grad.any())


def test_awqs_layout_needs_no_library(made, monkeypatch):
    path = made(format="auto_awq", sym=False)
    expected = load(path, kernel="packed").logits(TOKENS)
    monkeypatch.setattr(_kernels, "INSTALLED", False)
    loaded = load(path, kernel="packed")
    assert torch.equal(loaded.logits(TOKENS), expected)
    assert not any("auto-round-lib" in note for note in loaded.notes)


def test_fitted_zero_points_of_a_symmetric_checkpoint_are_refused(made, tmp_path):
    path = shutil.copytree(made(), tmp_path / "copy")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.qzeros"] += 1
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ModelError, match=r"up_proj.weight has no place .* zero points are fitted"):
        load(path, kernel="packed")
