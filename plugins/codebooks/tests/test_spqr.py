"""SpQR's layers against its definition, a weight at a time; what is refused."""

import struct

import numpy
import polyquant
import pytest
import torch
from polyquant.errors import ModelError
from polyquant.testing.checkpoints import assert_verified, changed_copy, replaced, without
from polyquant.testing.models import tiny_model
from polyquant_codebooks._layers import linear_from_tensors
from polyquant_codebooks.spqr.options import SpqrOptions
from polyquant.testing.oracles import agree

from .checkpoints import make_spqr, spqr_layer
from .conftest import LAYER, TOKENS

ROWS, COLUMNS = 48, 64


def defined(tensors, by_blocks):
    """The weight that the tensors stand for, in plain Python: each step of a tile is rounded to float16."""
    half = numpy.float16
    words = [int(word) & (2**64 - 1) for word in tensors["dense_weights"]]
    weight = numpy.zeros((ROWS, COLUMNS), dtype=half)
    for tile_row in range(ROWS // 16):
        for tile_column in range(COLUMNS // 16):
            start = 16 * (tile_row * (COLUMNS // 16) + tile_column)
            own = words[start : start + 16]
            statistics = bytes((own[2 * byte] >> 54) & 255 for byte in range(8))
            ss, zs, sz, zz = (half(number) for number in struct.unpack("<4e", statistics))
            for row, word in enumerate(own):
                scale = half(ss * half(half(word & 7) - sz))
                zero = half(zs * half(half((word >> 3) & 7) - zz))
                for column in range(16):
                    code = half((word >> (6 + 3 * column)) & 7)
                    weight[16 * tile_row + row, 16 * tile_column + column] = half(scale * half(code - zero))
    offsets, whole = tensors["row_offsets"].tolist(), weight.astype(numpy.float32)
    for block, (first, last) in enumerate(zip(offsets, offsets[1:], strict=False)):
        for place in range(first, last):
            entry = int(tensors["col_vals"][place]) & 0xFFFFFFFF
            row = 16 * block + (place - first) % 16 if by_blocks else block
            (value,) = struct.unpack("<e", struct.pack("<H", entry >> 16))
            whole[row, entry & 0xFFFF] += value
    whole = whole.astype(half).astype(numpy.float32)
    order = [number for pair in tensors["in_perm"].tolist() for number in (pair & 0xFFFF, (pair >> 16) & 0xFFFF)]
    plain = whole.copy()
    if order:
        plain[:, order] = whole
    return torch.from_numpy(plain)


def layer_of(tensors):
    shapes = tuple((f"proj.{part}.shape", len(tensor)) for part, tensor in tensors.items())
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    return linear_from_tensors("proj", linear, SpqrOptions(shapes=shapes), torch.float32, tensors)


@pytest.mark.parametrize("by_blocks", [False, True])
@pytest.mark.parametrize("ordered", [True, False])
def test_weights_are_those_of_the_definition(by_blocks, ordered):
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.1
    tensors, _ = spqr_layer(weight, by_blocks=by_blocks)
    if ordered:
        tensors = {**tensors, "in_perm": tensors["in_perm"][:0]}
    layer = layer_of(tensors)
    agree("spqr", "weights by definition", layer.dequantize(), defined(tensors, by_blocks))
    if not ordered:
        assert (layer.dequantize() - weight).abs().mean() < 0.03  # a step of three bits, near enough
    x = torch.randn(3, COLUMNS, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, -1))


@pytest.fixture(scope="module")
def checkpoint(folder):
    return make_spqr(tiny_model("llama", folder), "3bit", folder / "spqr")


def test_a_checkpoint_loads_and_is_saved(checkpoint, tmp_path):
    loaded = polyquant.load(checkpoint, device="cpu")
    assert_verified(loaded)
    again = polyquant.load(loaded.save(tmp_path / "again"), "spqr", device="cpu")
    assert again.config == loaded.config
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))


def longest_word(words):
    changed = words.clone()
    changed[0] = 0x7C << 54  # of the first statistic
    changed[2] = 0x7C << 54
    changed[1] = changed[0]
    return changed


@pytest.mark.parametrize(
    ("tensors", "stored", "words"),
    [
        (without(f"{LAYER}.row_offsets"), None, "row_offsets is missing"),
        (replaced(f"{LAYER}.row_offsets", lambda offsets: offsets.flip(0)), None, "row_offsets should grow from 0 to 1024"),
        (replaced(f"{LAYER}.col_vals", lambda values: values | 0xFFFF), None, "col_vals holds 65535, and there are 256"),
        (replaced(f"{LAYER}.in_perm", torch.zeros_like), None, "in_perm should name each of 256 columns once"),
        (replaced(f"{LAYER}.dense_weights", longest_word), None, "scales or outliers that are NaN or infinity"),
        (replaced(f"{LAYER}.dense_weights", lambda words: words[:-1].clone()), None, r"should be \(8192,\) int64"),
        (None, lambda stored: stored.update(bits=4), "cannot read its quantization_config"),
        (None, lambda stored: stored["shapes"].pop(f"{LAYER}.col_vals.shape"), "no shapes for col_vals"),
        (None, lambda stored: stored["shapes"].update({f"{LAYER}.in_perm.shape": 3}), "in_perm has 3 numbers, and 0 or 128"),
        (None, lambda stored: stored.update(perchannel=True), "it has perchannel, which is not read"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(checkpoint, tmp_path, tensors, stored, words):
    with pytest.raises(ModelError, match=words):
        polyquant.load(changed_copy(checkpoint, tmp_path, tensors, stored), device="cpu")
