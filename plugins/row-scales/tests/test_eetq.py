"""EETQ: the order of its kernels against a preprocessor written out from its definition, rounding, what is refused."""

import math

import polyquant
import pytest
import torch
from polyquant.errors import ConfigError, ModelError
from polyquant.testing.checkpoints import assert_verified, replaced, without
from polyquant.testing.models import tiny_model
from polyquant_row_scales._decode import eetq_of_rows, quantize_eetq, rows_of_eetq
from polyquant.testing.oracles import agree
from safetensors.torch import load_file
from transformers.integrations.eetq import EetqLinear

from .conftest import LAYER, TOKENS

PERMUTED = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]


def preprocessed(codes):
    """What EETQ's preprocessor does to integers (in_features, out_features), a number at a time: bytes.

    Rows are permuted in sixteens, the matrix is turned, columns are interleaved by two in runs of 64, each number gets
    128 more, and the middle ones of four bytes change places.
    """
    count_k, count_n = codes.shape
    flat = [0] * (count_k * count_n)
    for k in range(count_k):
        source = 16 * (k // 16) + PERMUTED[k % 16]
        for n in range(count_n):
            place = (n // 2) * 2 * count_k + 2 * 64 * (k // 64) + 64 * (n % 2) + k % 64
            flat[place] = int(codes[source, n]) + 128
    for start in range(0, len(flat), 4):
        flat[start + 1], flat[start + 2] = flat[start + 2], flat[start + 1]
    return torch.tensor(flat, dtype=torch.uint8)


@pytest.mark.parametrize("shape", [(64, 64), (64, 128), (128, 192)])
def test_the_order_is_that_of_the_preprocessor(shape):
    rows = torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    stored = eetq_of_rows(rows)
    assert stored.shape == shape[::-1]
    agree("eetq", "bytes by EETQ's preprocessor", stored.reshape(-1).view(torch.uint8), preprocessed(rows.T))
    assert torch.equal(rows_of_eetq(stored), rows)


def test_ties_are_rounded_away_from_zero():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    weight[0, :4] = torch.tensor([128.0, -2.5, 2.5, 0.5])  # of a scale of 1, where -128 would be one more
    weight[0, 4:], weight[1] = 0, 0
    codes, scales = quantize_eetq(weight)
    for row in range(64):
        scale = max(abs(value) for value in weight[row].tolist()) / 128
        assert scales[row] == torch.tensor(scale).half()
        for column, value in enumerate(weight[row].tolist()):
            exact = float(torch.tensor(value) / torch.tensor(scale)) if scale else 0.0
            away = math.copysign(math.floor(abs(exact) + 0.5), exact)
            assert codes[row, column] == min(127, max(-128, away))


def test_a_file_has_the_tensors_of_transformers_layer(made):
    """transformers runs it on NVIDIA GPUs alone, so what its layer takes is held against what is saved."""
    name, tensors = "model.layers.0.self_attn.q_proj", load_file(next(made("eetq").glob("*.safetensors")))
    theirs = EetqLinear(256, 256, bias=True).state_dict()
    found = {short: tensors[f"{name}.{short}"] for short in theirs}
    assert {short: each.shape for short, each in found.items()} == {short: each.shape for short, each in theirs.items()}
    assert (found["weight"].dtype, found["weight_scales"].dtype) == (torch.int8, torch.float16)
    rows, columns = theirs["weight"].shape[::-1]
    dense = load_file(tiny_model("qwen2", made("eetq").parent) / "model.safetensors")[f"{name}.weight"]
    codes, _ = quantize_eetq(dense)
    assert torch.equal(found["weight"].reshape(-1).view(torch.uint8), preprocessed(codes.T))
    assert (rows, columns) == tuple(dense.shape)


@pytest.mark.parametrize("kernel", ["library", "packed"])
def test_the_layout_that_is_assumed_is_said(made, kernel):
    loaded = polyquant.load(made("eetq"), "eetq", device="cpu", kernel=kernel)
    assert_verified(loaded)
    assert any("does not record" in note and "7.5 to 8.9" in note for note in loaded.notes)
    assert loaded.logits(TOKENS).isfinite().all()


@pytest.mark.parametrize(
    ("tensors", "stored", "words"),
    [
        (without(f"{LAYER}.weight_scales"), None, r"up_proj.weight is torch.int8, and has no weight_scales"),
        (replaced(f"{LAYER}.weight", lambda weight: weight[:-1]), None, r"should be \(256, 512\) int8, and is \(255"),
        (replaced(f"{LAYER}.weight_scales", lambda scales: scales.float()), None, r"should be \(512,\) float16"),
        (None, {"weights": "int4"}, "cannot read its quantization_config"),
        (None, {"bits": 8}, "it has bits, which is not read"),
    ],
)
def test_what_does_not_fit_is_refused(made, changed, tensors, stored, words):
    path = changed(made("eetq"), tensors, stored and (lambda found: found.update(stored)))
    with pytest.raises(ModelError, match=words):
        polyquant.load(path, "eetq", device="cpu")


def test_sizes_of_no_whole_tiles_are_refused(folder):
    with pytest.raises(ConfigError, match="whole tiles of 64 rows and 64 columns"):
        polyquant.load(tiny_model("odd", folder), "eetq", device="cpu")
