"""HIGGS: the order of its codes and its numbers against their definitions, a code at a time; what is refused."""

import polyquant
import pytest
import torch
from polyquant.errors import ConfigError, ModelError
from polyquant.testing.checkpoints import assert_verified, changed_copy, replaced, without
from polyquant.testing.models import tiny_model
from polyquant_codebooks.higgs._decode import rows_of_words, words_of_rows
from polyquant_codebooks.higgs._quantize import quantize, quantize_linear
from polyquant_codebooks.higgs.options import HiggsOptions
from polyquant.testing.oracles import agree
from transformers.integrations.higgs import get_higgs_grid

from .conftest import LAYER, TOKENS
from .test_exl3 import hadamard

BLOCKS = [0, 3, 6, 9, 12, 1, 4, 7, 10, 13, 2, 5, 8, 11, 14, 15]


def code_of(words, bits, tile, k, n):
    """The code of input k and output n, found bit by bit in stored words of int16, (outputs * bits / 16, inputs)."""

    def word(row, input):
        return int(words[row, input]) & 0xFFFF

    pair, outputs = k // 2 * 2, words.shape[0] * 16 // bits
    if bits != 3:
        each = 16 // bits
        block, place = divmod(n % (tile * each), tile)
        half, inside = divmod(block, each // 2)
        code = 2 * inside + 1 - k % 2
        row = n // (tile * each) * tile + place
        return (word(row, pair + half) >> (bits * code)) & (2**bits - 1)
    tile_of, inside = divmod(n, 512)
    block, place = divmod(inside, 32)
    rows = [tile_of * 32 + place, *(outputs // 16 + tile_of * 64 + 32 * which + place for which in (0, 1))]
    even, odd = ([word(row, pair + which) for row in rows] for which in (0, 1))
    string = ""
    for first, second in zip(even, odd, strict=True):
        string += f"{first:016b}"[::-1] + f"{second:016b}"[::-1][:14]
    string += "".join(f"{second:016b}"[::-1][14:] for second in odd)
    code = 2 * BLOCKS.index(block) + 1 - k % 2
    return int(string[3 * code : 3 * code + 3][::-1], 2)


@pytest.mark.parametrize(
    ("bits", "tile", "outputs"), [(2, 32, 512), (2, 64, 512), (4, 32, 256), (4, 64, 256), (3, 32, 1024)]
)
def test_codes_lie_as_the_order_is_defined(bits, tile, outputs):
    codes = torch.randint(0, 2**bits, (outputs, 4), generator=torch.Generator().manual_seed(bits))
    words = words_of_rows(codes, bits, tile)
    assert (words.shape, words.dtype) == ((outputs * bits // 16, 4), torch.int16)
    assert torch.equal(rows_of_words(words, bits, tile), codes)
    found = [[code_of(words, bits, tile, k, n) for k in range(4)] for n in range(outputs)]
    assert torch.equal(torch.tensor(found), codes)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_are_rounded_to_the_nearest_point_of_the_grid(bits, p):
    config = HiggsOptions(bits=bits, p=p, group_size=64, hadamard_size=128)
    linear = torch.nn.Linear(200, 512, bias=True)
    linear.weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    linear.weight.data[3] = 0
    layer = quantize_linear("proj", linear, config)
    grid, block = get_higgs_grid(p, 2 ** (p * bits)), hadamard(128) * 128**0.5
    padded = torch.nn.functional.pad(linear.weight.detach(), (0, 56))
    for row in (0, 3, 511):
        for start in (0, 128):
            own = padded[row, start : start + 128]
            length = own.norm()
            normal = (block @ own / (length if length else 1)).view(-1, p)
            nearest = grid[torch.cdist(normal, grid).argmin(-1)].half().float().flatten()
            expected = nearest * (length / 128**0.5).half().float()
            back = block @ expected / 128**0.5
            found = layer.dequantize()[row, start : start + 128]
            agree("higgs", "weights by definition, transformers' grid", found, back[: 200 - start], allowed=1e-4)
    error = (layer.dequantize() - linear.weight).norm() / linear.weight.norm()
    assert error < {2: 0.4, 3: 0.22, 4: 0.12}[bits]
    x = torch.randn(3, 200, requires_grad=True)
    answer = layer(x)
    torch.testing.assert_close(answer, x @ layer.dequantize().T + linear.bias, rtol=1e-4, atol=1e-4)
    answer.sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)


def test_tiles_of_other_templates_are_read(folder):
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    numbers = []
    for template in (0, 16, 63, 64, 111, 112):
        config = HiggsOptions(templates=(("proj", template),))
        from polyquant_codebooks._layers import linear_from_tensors

        tensors = quantize(weight, config, config.tile_of("proj"))
        linear = torch.nn.Linear(512, 256, bias=False)
        numbers.append(linear_from_tensors("proj", linear, config, torch.float32, tensors).dequantize())
    assert all(torch.equal(each, numbers[0]) for each in numbers)


@pytest.fixture(scope="module")
def checkpoint(folder):
    return polyquant.load(tiny_model("qwen2", folder), "higgs", device="cpu").save(folder / "higgs")


def test_a_checkpoint_loads_and_is_saved(checkpoint, tmp_path):
    loaded = polyquant.load(checkpoint, device="cpu")
    assert_verified(loaded)
    again = polyquant.load(loaded.save(tmp_path / "again"), "higgs", device="cpu")
    assert again.config == loaded.config
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))


def template(value):
    return lambda stored: stored["tune_metadata"][LAYER].update(template_id=value)


@pytest.mark.parametrize(
    ("tensors", "stored", "words"),
    [
        (without(f"{LAYER}.scales"), None, "scales is missing"),
        (
            replaced(f"{LAYER}.weight", lambda words: words[:-1].clone()),
            None,
            r"weight .* should be \(128, 512\) int16",
        ),
        (replaced(f"{LAYER}.scales", lambda scales: scales.bfloat16()), None, "are of 2 dtypes"),
        (None, template(200), "its template_id is 200, and of 4 bits there are 144"),
        (None, template(None), "has no template_id"),
        (None, lambda stored: stored["tune_metadata"].pop(LAYER), "no template_id for this layer"),
        (None, lambda stored: stored.update(tune_metadata={}), "it has no tune_metadata"),
        (None, lambda stored: stored.update(hadamard_size=64), "no multiple of group_size 256"),
        (None, lambda stored: stored.update(rotation=1), "it has rotation, which is not read"),
    ],
)
def test_what_does_not_fit_is_refused(checkpoint, tmp_path, tensors, stored, words):
    with pytest.raises(ModelError, match=words):
        polyquant.load(changed_copy(checkpoint, tmp_path, tensors, stored), device="cpu")


def test_rows_of_no_whole_tiles_are_refused(folder):
    with pytest.raises(ConfigError, match="HIGGS with 4 bits packs tiles of 128 rows"):
        polyquant.load(tiny_model("odd", folder), "higgs", device="cpu")
