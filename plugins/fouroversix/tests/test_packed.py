"""kernel="packed": the same numbers in polyquant's own layout, padding and blocks of zeros included."""

import pytest
import torch
from polyquant.testing.models import tiny_model
from polyquant_fouroversix._layers import pack, quantize_linear
from polyquant_fouroversix.formats import RULES
from polyquant_fouroversix.options import FouroversixOptions
from polyquant_fouroversix.planning import LAYOUTS

from .conftest import load


@pytest.mark.parametrize("shape", [(128, 64), (203, 90), (30, 200), (8, 72), (5, 16)])
@pytest.mark.parametrize(
    ("dtype", "rule", "square"),
    [(dtype, rule, False) for dtype in RULES for rule in RULES[dtype]] + [("nvfp4", "mse", True)],
)
def test_weights_are_the_same(dtype, rule, square, shape):
    linear = torch.nn.Linear(shape[1], shape[0])
    linear.weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    linear.weight.data[:3] = 0
    layer = quantize_linear(linear, FouroversixOptions(dtype=dtype, scale_rule=rule, weight_scale_2d=square))
    weight, expected = pack(layer), torch.cat(list(layer.pieces()))
    assert (weight.shape, weight.format) == (shape, LAYOUTS[dtype])
    torch.testing.assert_close(weight.decode(), expected, rtol=3e-7 if dtype == "if4" else 0, atol=0)


def test_it_is_said_that_activations_are_not_rounded(folder):
    path = tiny_model("llama", folder)
    said = [
        any("activations are not rounded" in note for note in load(path, **options).notes)
        for options in ({"kernel": "packed"}, {"kernel": "packed", "quantize_activations": False}, {})
    ]
    assert said == [True, False, False]
