"""kernel="packed": the same numbers in polyquant's own layout; what has no place there stays with the library."""

import pytest
import torch
from hqq.core.quantize import HQQLinear
from polyquant.plugin import WeightInfo
from polyquant.plugin.layers import PackedLinear
from polyquant.testing.checkpoints import assert_verified
from polyquant.testing.models import tiny_model
from polyquant_hqq._layers import pack, quantize_linear
from polyquant_hqq.options import HqqOptions
from polyquant_hqq.planning import packed_format
from polyquant.testing.oracles import agree

from .test_hqq import TOKENS, load

NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("group_size", [16, 64])
@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_the_same(bits, optimize, group_size, name):
    linear = torch.nn.Linear(128, 20)
    linear.weight.data.normal_(mean=0.02, std=0.1, generator=torch.Generator().manual_seed(0))
    config = HqqOptions(bits=bits, group_size=group_size, optimize=optimize, compute_dtype=name)
    layer = quantize_linear(linear, config)
    info = WeightInfo(name="up_proj.weight", shape=(20, 128), dtype=name, role="linear", module="Linear")
    weight = pack(layer)
    assert (weight.shape, weight.format) == ((20, 128), packed_format(info, config))
    layer.meta |= {key: layer.meta[key].float() for key in ("scale", "zero")} | {"compute_dtype": torch.float32}
    expected = layer.dequantize()
    agree("hqq", "hqq's dequantize", weight.decode(), expected, allowed=1e-6)


@pytest.mark.parametrize(
    "options", [{"axis": 0}, {"group_size": 8}, {"bits": 2}, {"bits": 1}], ids=["axis", "group", "two", "one"]
)
def test_what_has_no_place_stays_with_the_library(tmp_path, options):
    path = tiny_model("llama", tmp_path)
    loaded = load(path, kernel="packed", optimize=False, **options)
    assert isinstance(loaded.model.get_submodule(NAME), HQQLinear)
    assert any("no place in the packed layout" in note for note in loaded.notes)
    assert_verified(loaded)
    library = load(path, kernel="library", compute_dtype="float32", optimize=False, **options)
    assert torch.equal(loaded.logits(TOKENS), library.logits(TOKENS))


def test_a_quantized_head_is_packed(tmp_path):
    loaded = load(tiny_model("llama", tmp_path), kernel="packed", optimize=False, skip_defaults=False)
    assert isinstance(loaded.model.lm_head, PackedLinear) and isinstance(loaded.model.get_submodule(NAME), PackedLinear)
    assert_verified(loaded)
