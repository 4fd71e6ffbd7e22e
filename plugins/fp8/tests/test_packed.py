"""kernel="packed": FP8 weights in polyquant's own layout, the same numbers; odd blocks stay with this package."""

import pytest
import torch
from polyquant.errors import ModelError
from polyquant.plugin.layers import PackedLinear
from polyquant.testing.checkpoints import assert_verified
from polyquant.testing.models import tiny_model
from polyquant_fp8._layers import pack, quantize_linear
from polyquant_fp8._modules import Fp8Linear
from polyquant_fp8.options import Fp8Options
from polyquant_fp8.planning import packed_format

from .conftest import load

BLOCKS = {
    "128": {}, "ue8m0": {"scale_fmt": "ue8m0"}, "tensor": {"block_rows": 0, "block_columns": 0},
    "rows": {"block_rows": 3, "block_columns": 48},
}  # fmt: skip


@pytest.mark.parametrize("shape", [(96, 256), (203, 90), (90, 203)])
@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_weights_are_this_packages_bit_for_bit(shape, options):
    config = Fp8Options(**options)
    layer = quantize_linear(torch.nn.Linear(shape[1], shape[0]), config)
    weight = pack(layer)
    assert weight.format == packed_format(config)
    assert torch.equal(weight.decode(), torch.cat(list(layer._pieces())).float())


def test_weights_that_are_no_numbers_are_refused():
    layer = quantize_linear(torch.nn.Linear(64, 64), Fp8Options())
    layer.weight.data.view(torch.uint8)[1, 1] = 127
    with pytest.raises(ModelError, match="some of its weights are NaN"):
        pack(layer)


def test_blocks_of_other_columns_stay(tmp_path):
    options = {"block_rows": 24, "block_columns": 24}
    path = tiny_model("llama", tmp_path)
    loaded, library = (load(path, kernel=each, **options) for each in ("packed", "library"))
    assert_verified(loaded)
    layers = [module for module in loaded.model.modules() if isinstance(module, PackedLinear)]
    assert all(isinstance(module, Fp8Linear) for module in layers)
    assert any("no place in the packed layout" in note for note in loaded.notes)
    tokens = [3, 4, 5, 6]
    assert torch.equal(loaded.logits(tokens), library.logits(tokens))
    assert any(isinstance(module, Fp8Linear) for module in loaded.model.modules())
