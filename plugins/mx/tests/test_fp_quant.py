"""Rotated weights are those of fp_quant's own kernels; its checkpoints are read with the matrix that they hold."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import polyquant
import pytest
import torch
from polyquant.errors import ConfigError, ModelError
from polyquant.plugin.activations import rounded
from polyquant.testing.checkpoints import adapter_gradients, assert_verified, changed_copy, replaced
from polyquant.testing.models import tiny_model
from polyquant_mx import formats
from polyquant_mx._decode import rotated
from polyquant_mx._modules import MxLinear
from polyquant_mx._quantize import hadamard, quantized
from polyquant.testing.oracles import agree
from safetensors.torch import load_file
from torch.nn import functional

from .checkpoints import TOKENS

LAYER = "model.layers.1.mlp.up_proj"


def load(path, **options):
    return polyquant.load(path, "fp-quant", device="cpu", **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What fp_quant's kernels make of random matrices."""
    out = tmp_path_factory.mktemp("made") / "tensors.safetensors"
    script = Path(__file__).with_name("fp_quant_makes.py")
    interpreted = {**os.environ, "TRITON_INTERPRET": "1"}  # which Triton reads when it is imported
    command = [sys.executable, script, out]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=interpreted)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return load_file(out)


@pytest.mark.parametrize(("size", "dtype"), [(32, "mxfp4"), (128, "mxfp4"), (16, "nvfp4"), (128, "nvfp4")])
def test_weights_are_those_of_the_librarys_kernels(made, size, dtype):
    weight, expected = made[f"{size}.weight"], made[f"{size}.{dtype}"]
    usual = formats.MXFP4_ROTATED if dtype == "mxfp4" else formats.NVFP4_ROTATED
    scheme = usual._replace(rotation=size)
    torch.testing.assert_close(hadamard(size), made[f"{size}.rotation"], rtol=0, atol=1e-7)
    parts = quantized(weight, scheme)
    layer = MxLinear(torch.nn.Linear(256, 32, bias=False, device="meta"), scheme, parts)
    found = torch.cat(list(layer.pieces()))
    close = torch.isclose(found, expected, rtol=1e-6, atol=0)
    if dtype == "nvfp4":  # Triton's interpreter loses the carry where a scale rounds up to a power of two
        exact = (weight.unflatten(1, (-1, size)) @ hadamard(size)).flatten(1).unflatten(1, (-1, 16)).abs().amax(-1)
        carried = torch.frexp(parts["scales"].float()).exponent > torch.frexp(exact * 10 / 6).exponent
        assert carried.float().mean() < 0.1
        close |= carried.repeat_interleave(16, 1)
    assert float(close.float().mean()) > 0.999  # sums in another order may round otherwise
    exact = torch.isclose(found, expected, rtol=1e-6, atol=0)
    agree("fp-quant", "fp_quant's kernels in Triton's interpreter, ties apart", found[exact], expected[exact],
          allowed=1e-6)  # fmt: skip
    inputs = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(inputs), inputs @ layer.dequantize().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "dtype"), [(32, "mxfp4"), (128, "mxfp4"), (16, "nvfp4"), (128, "nvfp4")])
def test_emulated_activations_are_those_of_the_librarys_kernels(made, size, dtype):
    """The kernels rotate and round activations as they do weights; only the scale of all blocks is given."""
    usual = formats.MXFP4_ROTATED if dtype == "mxfp4" else formats.NVFP4_ROTATED
    scheme = usual._replace(rotation=size)
    layer = MxLinear(
        torch.nn.Linear(256, 32, bias=False, device="meta"), scheme, quantized(made[f"{size}.weight"], scheme)
    )
    inputs, expected = rotated(made[f"{size}.weight"], hadamard(size)), made[f"{size}.{dtype}"]
    close = torch.isclose(rounded(inputs, scheme.activations, layer.static_scale), expected, rtol=1e-6, atol=0)
    if dtype == "nvfp4":  # Triton's interpreter loses the carry where a scale rounds up to a power of two
        scales = inputs.unflatten(1, (-1, 16)).abs().amax(-1) * 10 / 6
        close |= (
            torch.frexp(scales.to(torch.float8_e4m3fn).float()).exponent > torch.frexp(scales).exponent
        ).repeat_interleave(16, 1)
    assert float(close.float().mean()) > 0.999  # sums in another order may round otherwise


@pytest.fixture(scope="module")
def checkpoint(folder):
    return load(tiny_model("llama", folder)).save(folder / "fp-quant")


@pytest.fixture
def changed(checkpoint, tmp_path):
    """The checkpoint with its tensors and its quantization_config changed by functions."""
    return partial(changed_copy, checkpoint, tmp_path)


def test_scales_that_are_filled_up_and_other_matrices_are_read(checkpoint, changed):
    def as_matrix_units_read(tensors):
        for name, tensor in list(tensors.items()):
            if name.endswith(".scales"):
                rows, groups = tensor.shape
                tensors[name] = functional.pad(tensor, (0, -groups % 4 + 4, 0, -rows % 128 + 128), value=0)

    assert torch.equal(load(changed(as_matrix_units_read)).logits(TOKENS), load(checkpoint).logits(TOKENS))
    turned = load(changed(replaced(f"{LAYER}.forward_hadamard_matrix", lambda matrix: matrix.flip(1).contiguous())))
    assert_verified(turned)
    before, after = (one.model.get_submodule(LAYER).dequantize() for one in (load(checkpoint), turned))
    stored = before.unflatten(1, (-1, 16)) @ hadamard(16)
    torch.testing.assert_close(after, (stored @ hadamard(16).flip(1).T).flatten(1), rtol=1e-5, atol=1e-6)


def test_adapters_get_the_gradients_of_the_decoded_model(checkpoint, folder):
    from transformers import AutoModelForCausalLM

    loaded = load(checkpoint)
    twin = AutoModelForCausalLM.from_pretrained(tiny_model("llama", folder), dtype=torch.float32)
    for name, module in loaded.model.named_modules():
        if isinstance(module, MxLinear):
            twin.get_submodule(name).weight.data = module.dequantize()
    expected = adapter_gradients(twin, TOKENS)
    found = adapter_gradients(loaded.backend.prepare_for_training(loaded), TOKENS)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"pseudoquantization": True}, "its pseudoquantization is True: its weights are dense numbers .*dqweight"),
        ({"store_master_weights": True}, "its store_master_weights is True: it holds dense weights alone"),
        ({"forward_dtype": "mxfp8"}, "mxfp8"),
        ({"forward_dtype": "mxfp4"}, "hadamard_group_size of mxfp4 must be 32, 64 or 128, got 16"),
        ({"rotation": 1}, "it has rotation, which is not read"),
    ],
)
def test_configs_that_are_not_read(changed, stored, words):
    with pytest.raises(ModelError, match=words):
        load(changed(stored=lambda found: found.update(stored)))


def test_what_has_no_place_is_refused(folder):
    with pytest.raises(ConfigError, match="rotated weights have no place in the packed layout"):
        load(tiny_model("llama", folder), kernel="packed")
    with pytest.raises(ConfigError, match="this format has no layout for them"):
        load(tiny_model("mixtral", folder))
