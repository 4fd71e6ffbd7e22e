"""kernel="packed" on checkpoints written from the formats' descriptions: the very weights that they stand for."""

import polyquant
import pytest
import torch
from polyquant.errors import ModelError
from polyquant.testing.checkpoints import assert_verified
from polyquant.testing.models import tiny_model
from polyquant.testing.oracles import agree

TOKENS = [3, 4, 5, 6, 7, 8, 9]
UP = "model.layers.1.mlp.up_proj"
GPTQ = [
    {"bits": 4, "group_size": -1, "layout": "gptq"},
    {"bits": 4, "group_size": 16, "layout": "gptq_v2", "sym": False},
    {"bits": 4, "group_size": 128, "layout": "gptq", "sym": False},
    {"bits": 4, "group_size": 256, "layout": "gptq", "order": True},
    {"bits": 4, "group_size": 32, "layout": "gptq_v2", "sym": False, "order": True},
    {"bits": 8, "group_size": 64, "layout": "gptq"},
    {"bits": 8, "group_size": 16, "layout": "gptq_v2", "sym": False, "order": True},
    {"bits": 8, "group_size": -1, "layout": "gptq", "sym": False},
]
AWQ = [
    {"group_size": -1},
    {"group_size": 16, "zero_point": False},
    {"group_size": 64},
    {"group_size": 256},
]
WRITTEN = [("gptq", variant) for variant in GPTQ] + [("awq", variant) for variant in AWQ]


def load(path, **options):
    return polyquant.load(path, device="cpu", kernel="packed", **options)


def packed_modules(loaded):
    """The layers that polyquant multiplies with, by the names of their modules."""
    return {
        layer.name.rpartition(".")[0]: loaded.model.get_submodule(layer.name.rpartition(".")[0])
        for layer in loaded.layers
        if layer.quantized and layer.kernel.startswith("packed")
    }


def assert_is(loaded, dense):
    """Every weight bit for bit, and the logits to rounding."""
    layers = packed_modules(loaded)
    assert len(layers) == sum(layer.quantized for layer in loaded.layers)
    for name, layer in layers.items():
        agree(loaded.backend.name, "weights by definition", layer.dequantize(), dense.get_submodule(name).weight)
    with torch.inference_mode():
        expected = dense(input_ids=torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(loaded.logits(TOKENS), expected, rtol=1e-2, atol=1e-2)
    assert_verified(loaded)


@pytest.mark.parametrize(
    ("method", "variant"),
    WRITTEN,
    ids=lambda each: each if isinstance(each, str) else "-".join(map(str, each.values())),
)
def test_a_packed_model_is_what_its_checkpoint_stands_for(tmp_path, folder, packing, method, variant):
    path = packing.writers[method](tiny_model("qwen2", folder), tmp_path / "out", **variant)
    loaded = load(path)
    assert loaded.config.kernel == "packed"
    assert_is(loaded, packing.equal_dense(path))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_sizes_that_other_kernels_do_not_take(tmp_path, folder, packing, method):
    """A k_proj of 40 rows, and groups that do not fill the last block of 96 columns."""
    model = packing.with_odd_sizes(folder, tmp_path / "model")
    path = packing.writers[method](model, tmp_path / "out", group_size=16)
    assert_is(load(path), packing.equal_dense(path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_scales_stay_in_their_dtype(tmp_path, folder, packing, method, dtype):
    """gptqmodel writes AWQ's in bfloat16, auto-gptq on a CPU in float32."""
    path = packing.writers[method](tiny_model("llama", folder), tmp_path / "out")

    def change(tensors):
        for name, tensor in list(tensors.items()):
            if name.endswith(".scales"):
                tensors[name] = tensor.to(dtype)

    packing.change_tensors(path, change)
    loaded = load(path)
    assert {layer.packed.scales.dtype for layer in packed_modules(loaded).values()} == {dtype}
    assert_verified(loaded)
    plan = polyquant.plan(path, method, device="cpu", kernel="packed")
    assert plan.weights_planned_bytes == sum(layer.stored_bytes for layer in loaded.layers)


@pytest.mark.parametrize("bits", [2, 3])
def test_layers_of_few_bits_stay_with_the_library(tmp_path, folder, packing, bits):
    path = packing.write_gptq(tiny_model("llama", folder), tmp_path / "out", bits=bits)
    loaded = load(path)
    assert not packed_modules(loaded)
    assert any("the library multiplies with" in note for note in loaded.notes)
    assert_verified(loaded)
    library = polyquant.load(path, device="cpu", kernel="library", compute_dtype="float32")
    assert torch.equal(loaded.logits(TOKENS), library.logits(TOKENS))


def test_the_library_is_what_auto_takes(tmp_path, folder, packing):
    path = packing.write_gptq(tiny_model("llama", folder), tmp_path / "out")
    auto, library = (polyquant.load(path, device="cpu", kernel=kernel) for kernel in ("auto", "library"))
    assert auto.kernel == library.kernel == "gptqmodel TorchAtenLinear"


def test_what_a_checkpoint_says_otherwise_than_its_config_is_refused(tmp_path, folder, packing):
    path = packing.write_gptq(tiny_model("llama", folder), tmp_path / "out", sym=False, order=True)
    packing.change_stored(path, sym=True)
    with pytest.raises(ModelError, match=r"q_proj.weight has no place .* zero points are fitted.*kernel='library'"):
        load(path)
    packing.change_stored(path, sym=False, desc_act=False)
    with pytest.raises(ModelError, match=r"q_proj.weight has no place .* columns are reordered.*kernel='library'"):
        load(path)
