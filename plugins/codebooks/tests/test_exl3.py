"""EXL3's layers against its definition, a weight at a time; what is refused, and what is said."""

import json

import numpy
import polyquant
import pytest
import torch
from polyquant.errors import ModelError
from polyquant.testing.checkpoints import assert_verified, changed_copy, put, without
from polyquant.testing.models import tiny_model
from polyquant_codebooks._layers import linear_from_tensors
from polyquant_codebooks.exl3.options import Exl3Options
from polyquant.testing.oracles import agree

from .checkpoints import exl3_layer, make_exl3
from .conftest import LAYER, TOKENS

WORD = 2**32 - 1


def value_of(state, codebook):
    """A state's number, as exllamav3's kernels compute it: in float16, of a hash of 32 bits."""

    def half(bits):
        return numpy.array([bits], dtype=numpy.uint16).view(numpy.float16)[0]

    if codebook == "mul1":
        hashed = state * 0x83DCD12D & WORD
        number = half(0x6400 + sum(hashed.to_bytes(4, "little")))
        return numpy.float16(float(number) * float(half(0x1EEE)) + float(half(0xC931)))  # fused: rounded once
    hashed = state * 0xCBAC1FED & WORD if codebook == "mcg" else state * 89226354 + 64248484 & WORD
    mixed = (hashed & 0x8FFF8FFF) ^ 0x3B603B60
    return numpy.float16(half(mixed & 0xFFFF) + half(mixed >> 16))


def inner_of(trellis, codebook):
    """The tiles' numbers, (in_features, out_features), one state after the other."""
    down, across, length = trellis.shape
    bits = length // 16
    matrix = numpy.zeros((16 * down, 16 * across), dtype=numpy.float32)
    for row in range(down):
        for column in range(across):
            words = trellis[row, column].contiguous().view(torch.int32).tolist()
            ring = "".join(f"{word & WORD:032b}" for word in words)
            for t in range(256):
                end = (t + 1) * bits
                state = int(
                    (ring + ring)[end - 16 + len(ring) : end + len(ring)] if end < 16 else ring[end - 16 : end], 2
                )
                lane, rest = divmod(t, 8)
                half, inside = divmod(rest, 4)
                k, n = lane % 4 * 2 + (0, 1, 8, 9)[inside], lane // 4 + 8 * half
                matrix[16 * row + k, 16 * column + n] = value_of(state, codebook)
    return torch.from_numpy(matrix)


def hadamard(size):
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def signs_of(signs):
    """Sixteen signs in a number, the first in the lowest bit: what older files have. int16."""
    negative = (signs < 0).view(-1, 16).long()
    return (negative << torch.arange(16)).sum(-1).to(torch.uint16).view(torch.int16)


@pytest.mark.parametrize("codebook", ["", "mcg", "mul1"])
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_weights_are_those_of_the_definition(bits, codebook):
    rows, columns = (128, 128) if bits != 3 else (128, 256)
    tensors, _ = exl3_layer(torch.empty(rows, columns), bits, codebook)
    linear = torch.nn.Linear(columns, rows, bias=False)
    layer = linear_from_tensors("proj", linear, Exl3Options(bits=bits), torch.float32, tensors)
    inner = inner_of(tensors["trellis"], codebook)
    assert torch.equal(layer.inner(), inner.T)
    block = hadamard(128)
    left, right = torch.block_diag(*[block] * (columns // 128)), torch.block_diag(*[block] * (rows // 128))
    turned = tensors["suh"].float()[:, None] * (left @ inner @ right) * tensors["svh"].float()
    agree("exl3", "weights by definition", layer.dequantize(), turned.T, allowed=1e-5)
    x = torch.randn(3, columns, requires_grad=True)
    answer = layer(x)
    torch.testing.assert_close(answer, x @ turned, rtol=1e-4, atol=1e-4)
    answer.sum().backward()
    torch.testing.assert_close(x.grad, turned.sum(1).expand(3, -1), rtol=1e-4, atol=1e-4)


def test_older_files_have_signs_instead_of_scales():
    tensors, _ = exl3_layer(torch.empty(128, 128))
    tensors = {**tensors, "svh": tensors["svh"].sign()}
    linear = torch.nn.Linear(128, 128, bias=False)
    new = linear_from_tensors("proj", linear, Exl3Options(), torch.float32, tensors)
    packed = {"trellis": tensors["trellis"], "su": signs_of(tensors["suh"]), "sv": signs_of(tensors["svh"])}
    old = linear_from_tensors("proj", linear, Exl3Options(), torch.float32, packed)
    assert torch.equal(old.dequantize(), new.dequantize())


@pytest.fixture(scope="module")
def checkpoint(folder):
    return make_exl3(tiny_model("llama", folder), "4bit", folder / "exl3")


def test_a_checkpoint_loads_says_that_it_is_slow_and_is_saved(checkpoint, tmp_path):
    loaded = polyquant.load(checkpoint, device="cpu")
    assert_verified(loaded)
    assert any("slow" in note and "exllamav3" in note for note in loaded.notes)
    again = polyquant.load(loaded.save(tmp_path / "again"), "exl3", device="cpu")
    assert again.config == loaded.config
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))


def test_modules_may_have_bits_of_their_own_and_the_head_is_quantized(checkpoint, tmp_path):
    """The tensors say so, and the model that is loaded."""

    def mixed(tensors):
        tensors.update({f"{LAYER}.{short}": part for short, part in exl3_layer(torch.empty(512, 256), 3)[0].items()})
        del tensors["lm_head.weight"]
        tensors.update({f"lm_head.{short}": part for short, part in exl3_layer(torch.empty(384, 256), 6)[0].items()})

    loaded = polyquant.load(changed_copy(checkpoint, tmp_path, mixed), device="cpu")
    assert_verified(loaded)
    bits = {layer.name: layer.bits for layer in loaded.layers if layer.quantized}
    assert (bits[f"{LAYER}.weight"], bits["lm_head.weight"]) == (3, 6)
    again = polyquant.load(loaded.save(tmp_path / "again"), device="cpu")
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))


def test_a_checkpoint_whose_config_says_nothing_is_told_by_its_tensors(checkpoint, tmp_path):
    path = changed_copy(checkpoint, tmp_path)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"what exl3 packs \(trellis, suh, svh\), and its config does not say"):
        polyquant.load(path, device="cpu")


def number(value):
    return torch.tensor(value - 2**32, dtype=torch.int32)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (without(f"{LAYER}.suh"), "suh is missing"),
        (put({f"{LAYER}.mcg": number(0xCBAC1FEE)}), "mcg holds .*, and .* is known"),
        (put({f"{LAYER}.mcg": number(0xCBAC1FED), f"{LAYER}.mul1": number(0x83DCD12D)}), "two tables of values"),
        (put({f"{LAYER}.trellis": torch.zeros(16, 32, 65, dtype=torch.int16)}), r"trellis .* should be \(16, 32, 64\)"),
        (put({f"{LAYER}.svh": torch.ones(512)}), r"svh .* should be \(512,\) float16"),
        (put({"model.layers.0.mlp.gate_up_proj.trellis": torch.zeros(1, 1, 64, dtype=torch.int16)}), "no Linear module"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(checkpoint, tmp_path, tensors, words):
    with pytest.raises(ModelError, match=words):
        polyquant.load(changed_copy(checkpoint, tmp_path, tensors), device="cpu")
