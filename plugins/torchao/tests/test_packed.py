"""kernel="packed": torchao's numbers in polyquant's own layout; what has no place there stays with torchao."""

import polyquant
import pytest
import torch
from polyquant.errors import ModelError, UnsupportedOperation
from polyquant.plugin import WeightInfo
from polyquant.plugin.layers import PackedLinear
from polyquant.testing.checkpoints import assert_verified
from polyquant.testing.models import tiny_model
from polyquant_torchao._layers import pack
from polyquant_torchao._library import quantize_config
from polyquant_torchao.options import TorchAoOptions
from polyquant_torchao.planning import packed_format
from polyquant.testing.oracles import agree
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchao.quantization import quantize_
from torchao.utils import TorchAOBaseTensor

from .test_torchao import TOKENS, load

UP = "model.layers.1.mlp.up_proj"
CASES = [
    ({"weights": "int8"}, (20, 90)),
    ({"weights": "float8"}, (20, 90)),
    *(({"weights": "int4", "group_size": size}, (20, 96)) for size in (16, 48, 96)),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("options", "shape"), CASES, ids=str)
def test_weights_are_the_same(options, shape, dtype):
    config = TorchAoOptions(**options, compute_dtype=dtype)
    linear = torch.nn.Linear(shape[1], shape[0], dtype=getattr(torch, dtype))
    linear.weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Sequential(linear)
    quantize_(model, quantize_config(config).quant_type)
    weight, stored = pack(model[0]), model[0].weight
    info = WeightInfo(name="up_proj.weight", shape=shape, dtype=dtype, role="linear", module="Linear")
    assert (weight.shape, weight.format) == (shape, packed_format(info, config))
    groups = stored.qdata.float().unflatten(1, (stored.scale.shape[1], -1))
    expected = (groups * stored.scale.float().unsqueeze(-1)).flatten(1)
    assert torch.equal(weight.decode(), expected)
    agree("torchao", "torchao's dequantize", weight.decode().to(stored.dtype), stored.dequantize())


@pytest.mark.parametrize(
    "options",
    [{"dynamic_activations": True}, {"weights": "int4", "group_size": 8}],
    ids=["dynamic", "group"],
)
def test_what_has_no_place_stays_with_the_library(tmp_path, options):
    path = tiny_model("llama", tmp_path)
    loaded = load(path, kernel="packed", **options)
    assert isinstance(loaded.model.get_submodule(UP).weight, TorchAOBaseTensor)
    assert any("no place in the packed layout" in note for note in loaded.notes)
    assert_verified(loaded)
    library = load(path, kernel="library", compute_dtype="float32", **options)
    assert torch.equal(loaded.logits(TOKENS), library.logits(TOKENS))


@pytest.mark.parametrize("options", [{"weights": "int8"}, {"weights": "int4"}], ids=str)
def test_a_checkpoint_and_its_head_are_packed(tmp_path, options):
    path = tiny_model("llama", tmp_path)
    saved = load(path, compute_dtype="bfloat16", skip_defaults=False, **options).save(tmp_path / "out")
    loaded = polyquant.load(saved, device="cpu", kernel="packed", compute_dtype="bfloat16")
    assert isinstance(loaded.model.lm_head, PackedLinear)
    assert isinstance(loaded.model.get_submodule(UP), PackedLinear)
    assert not any("stored in int8" in note for note in loaded.notes)
    assert_verified(loaded)


def test_zero_points_are_refused(tmp_path):
    saved = load(tiny_model("llama", tmp_path), compute_dtype="float32", weights="int4").save(tmp_path / "out")
    file = saved / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors[f"{UP}._weight_zero_point"] += 1
    save_file(tensors, file, metadata)
    with pytest.raises(ModelError, match=r"up_proj.weight has no place .* zero points.*kernel='library'"):
        polyquant.load(saved, device="cpu", kernel="packed")


def test_training_with_layers_left_with_the_library_asks_the_plugin(tmp_path):
    loaded = load(tiny_model("llama", tmp_path), kernel="packed", dynamic_activations=True)
    with pytest.raises(UnsupportedOperation, match="no gradient passes through dynamic_activations"):
        loaded.backend.prepare_for_training(loaded)
