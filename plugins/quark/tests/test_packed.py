"""kernel="packed": Quark's numbers in polyquant's own layout; fp8, and groups that have no place, stay with this package."""

import polyquant
import pytest
import torch
from polyquant.errors import ModelError
from polyquant.testing.checkpoints import assert_verified, changed_copy, put
from polyquant.testing.models import tiny_model
from polyquant_quark._layers import NIBBLES, QuarkLinear, pack, quark_linear
from polyquant_quark.options import QuarkOptions
from polyquant_quark.planning import layout, packed_format

TOKENS = [3, 4, 5, 6, 7, 8, 9]
UP = "model.layers.1.mlp.up_proj"
CASES = [
    *(({"weights": weights, "group_size": size, "granularity": "group"}, (24, 96))
      for weights in ("int4", "uint4", "int8") for size in (16, 48, 96)),
    *(({"weights": weights, "granularity": "channel"}, (24, 88)) for weights in ("int4", "uint4", "int8")),
    ({"weights": "int8"}, (203, 90)),
    ({"weights": "mxfp4"}, (20, 96)),
]  # fmt: skip


def random_tensors(shape, options):
    """Any codes that a checkpoint may hold, and of int4 no zero points."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, (size, kind) in layout(shape, options).items():
        if kind == "float32":
            tensors[name] = torch.rand(size, generator=generator)
            continue
        low, high = {"uint8": (0, 255), "int8": (-128, 128), "int32": (-(2**31), 2**31)}[kind]
        tensors[name] = torch.randint(low, high, size, generator=generator).to(getattr(torch, kind))
        if name == "weight_zero_point" and options.weights == "int4":
            tensors[name].zero_()
    return tensors


def layer_of(shape, options, tensors, packing="reorder"):
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    return quark_linear(linear, options, torch.float32, packing, tensors)


@pytest.mark.parametrize("packing", NIBBLES)
@pytest.mark.parametrize(("options", "shape"), CASES, ids=str)
def test_weights_bit_for_bit(options, shape, packing):
    options = QuarkOptions(**options)
    layer = layer_of(shape, options, random_tensors(shape, options), packing)
    weight = pack(layer)
    assert (weight.shape, weight.format) == (shape, packed_format(options))
    assert torch.equal(weight.decode(), layer.dequantize())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes checkpoints of the small llama; not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    return lambda **options: polyquant.quantize(
        tiny_model("llama", folder), "quark", folder / "-".join(map(str, options.values())), device="cpu", **options
    )


@pytest.mark.parametrize("options", [{"weights": "fp8"}, {"weights": "int8", "granularity": "group", "group_size": 8}])
def test_what_has_no_place_stays(made, options):
    path = made(**options)
    loaded, own = (
        polyquant.load(path, device="cpu", kernel=kernel, compute_dtype="float32") for kernel in ("packed", "library")
    )
    assert isinstance(loaded.model.get_submodule(UP), QuarkLinear)
    assert any("no place in the packed layout" in note for note in loaded.notes)
    assert torch.equal(loaded.logits(TOKENS), own.logits(TOKENS))


def test_zero_points_of_int8_are_kept_and_of_int4_refused(made, tmp_path):
    generator = torch.Generator().manual_seed(0)
    zeros = torch.randint(-128, 128, (512,), generator=generator).to(torch.int8)
    shifted = changed_copy(made(weights="int8"), tmp_path / "int8", put({f"{UP}.weight_zero_point": zeros}))
    loaded, own = (polyquant.load(shifted, device="cpu", kernel=kernel) for kernel in ("packed", "library"))
    assert not isinstance(loaded.model.get_submodule(UP), QuarkLinear)
    assert torch.equal(loaded.model.get_submodule(UP).dequantize(), own.model.get_submodule(UP).dequantize())
    assert_verified(loaded)
    words = torch.full((64,), 1, dtype=torch.int32)
    path = made(weights="int4", granularity="channel")
    shifted = changed_copy(path, tmp_path / "int4", put({f"{UP}.weight_zero_point": words}))
    with pytest.raises(ModelError, match=r"up_proj.weight has no place .* int4 with zero points.*kernel='library'"):
        polyquant.load(shifted, device="cpu", kernel="packed")
