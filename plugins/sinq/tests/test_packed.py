"""kernel="packed": sinq's numbers in polyquant's own layout, scales of columns too; what has no place there stays."""

import polyquant
import pytest
import torch
from polyquant.plugin import WeightInfo
from polyquant.testing.checkpoints import assert_verified, changed_copy
from polyquant.testing.models import tiny_model
from polyquant_sinq._layers import SinqLinear, pack, quantize_linear
from polyquant_sinq.options import SinqOptions
from polyquant_sinq.planning import packed_format, plan_layers

from .test_sinq import TOKENS, load

UP = "model.layers.1.mlp.up_proj"
SHAPES = {64: (192, 256), 48: (32, 144), 16: (36, 128)}  # columns, or rows, are filled up for the last two


@pytest.mark.parametrize("heavy", [False, True], ids=["", "heavy"])
@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_weights_bit_for_bit(bits, size, heavy):
    rows, columns = shape = SHAPES[size]
    linear = torch.nn.Linear(columns, rows)
    torch.nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(0))
    if heavy:  # tails for which sinq leaves out the scales of columns
        linear.weight.data.pow_(3)
    config = SinqOptions(bits=bits, group_size=size, compute_dtype="float32")
    layer = quantize_linear(linear, config)
    assert bool((layer.columns == 1).all()) == heavy
    weight = pack(layer)
    assert (weight.shape, weight.format) == (shape, packed_format(config))
    assert torch.equal(weight.decode(), layer.dequantize())


@pytest.mark.parametrize("options", [{"bits": 3}, {"tiling": "2D"}], ids=str)
def test_what_has_no_place_stays(tmp_path, options):
    path = tiny_model("llama", tmp_path)
    loaded, library = (load(path, kernel=kernel, **options) for kernel in ("packed", "library"))
    assert isinstance(loaded.model.get_submodule(UP), SinqLinear)
    assert any("no place in the packed layout" in note for note in loaded.notes)
    assert_verified(loaded)
    assert torch.equal(loaded.logits(TOKENS), library.logits(TOKENS))


def test_groups_that_are_no_whole_sixteens_have_no_place():
    weight = WeightInfo(name="up_proj.weight", shape=(64, 96), dtype="float32", role="linear", module="Linear")
    plans = [plan_layers([weight], SinqOptions(group_size=size))[0] for size in (24, 48)]
    assert all(plan.quantized for plan in plans)
    assert plans[0].packed is None
    assert plans[1].packed == packed_format(SinqOptions(group_size=48))


@pytest.mark.parametrize("method", ["sinq", "asinq"])
def test_checkpoints_in_sixteen_bits_and_their_heads_are_packed(tmp_path, method):
    dense = load(tiny_model("llama", tmp_path), compute_dtype="bfloat16", skip_defaults=False)
    path = changed_copy(
        dense.save(tmp_path / "saved"), tmp_path / "out", stored=lambda stored: stored.update(method=method)
    )
    loaded = polyquant.load(path, device="cpu", kernel="packed", compute_dtype="bfloat16")
    library = polyquant.load(path, device="cpu", compute_dtype="float32")
    assert loaded.config.method == method
    assert_verified(loaded)
    assert not any(isinstance(module, SinqLinear) for module in loaded.model.modules())
    for name in ("lm_head", UP):
        mine, theirs = (each.model.get_submodule(name) for each in (loaded, library))
        assert torch.equal(mine.dequantize(), theirs.dequantize())
    again = polyquant.load(loaded.save(tmp_path / "again"), device="cpu", kernel="packed")
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))
