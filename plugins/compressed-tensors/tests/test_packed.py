"""kernel="packed": the same numbers in polyquant's own layout, whatever the scheme."""

import polyquant
import pytest
import torch
from polyquant.plugin import WeightInfo
from polyquant.plugin.layers import PackedLinear as AnyPacked
from polyquant.testing.checkpoints import adapter_gradients, assert_verified
from polyquant_compressed_tensors._kernels import Int4PackLinear
from polyquant_compressed_tensors._layers import CompressedLinear, pack, packed_linear
from polyquant_compressed_tensors.options import CompressedTensorsOptions
from polyquant_compressed_tensors.planning import packed_format
from safetensors.torch import load_file

from .conftest import load
from .test_layers import LAYOUTS, formats, linear, random_tensors

TOKENS = [3, 4, 5, 6, 7, 8, 9]
UP = "model.layers.1.mlp.up_proj"
PACKED = {
    **LAYOUTS,
    "int4-16": {"group_size": 16, "symmetric": False},
    "int8-256": {"weights": "int8", "group_size": 256, "symmetric": False},
}
CASES = [(name, (96, 256)) for name in PACKED]
CASES += [(name, shape) for name in PACKED if "channel" in name for shape in ((203, 90), (90, 203))]
CASES += [("int4-16", (20, 48))]  # its last block is filled up


def weight_info(shape, stored, dtype):
    return WeightInfo(
        name="up_proj.weight", shape=shape, dtype=dtype, role="linear", module="Linear", parts={"weight_scale": stored}
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_weights_bit_for_bit_with_the_scales_that_are_stored(name, shape, dtype):
    options = CompressedTensorsOptions(**PACKED[name])
    for plain in formats(options):
        tensors = random_tensors(shape, options, getattr(torch, dtype), plain)
        layer = packed_linear(linear(shape), options, torch.float32, tensors, plain=plain)
        weight = pack(layer)
        stored = str(tensors["weight_scale"].dtype).removeprefix("torch.")
        assert weight.format == packed_format(weight_info(shape, stored, "float32"), options)
        assert name in ("mxfp8", "mxfp4", "nvfp4") or weight.format.scale_dtype == dtype
        assert torch.equal(weight.decode(), layer.dequantize())


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_in_sixteen_bits_scales_are_those_that_this_package_multiplies_with(stored):
    for name in ("int4", "int8-group-asymmetric"):
        options, shape = CompressedTensorsOptions(**PACKED[name]).with_kernel("cpu", "bfloat16"), (96, 256)
        tensors = random_tensors(shape, options, stored, False)
        layer = packed_linear(linear(shape), options, torch.bfloat16, tensors, plain=False)
        weight = pack(Int4PackLinear(layer) if options.kernel == "pack_mm" else layer)
        assert weight.format == packed_format(weight_info(shape, "float32", "bfloat16"), options)
        assert torch.equal(weight.decode().bfloat16(), layer.dequantize())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["int4", "int8-group-asymmetric", "nvfp4"])
def test_what_is_saved_is_what_this_package_saves(checkpoint, tmp_path, name, dtype):
    path, whole = checkpoint(**LAYOUTS[name]), {"embeddings": "keep", "head": "keep"}
    loaded = load(path, kernel="packed", compute_dtype=dtype, **whole)
    assert_verified(loaded)
    assert isinstance(loaded.model.get_submodule(UP), AnyPacked)
    library = load(path, kernel="library", compute_dtype=dtype)
    saved = [each.save(tmp_path / name) for name, each in (("packed", loaded), ("library", library))]
    mine, theirs = (next(out.glob("*.safetensors")).read_bytes() for out in saved)
    assert mine == theirs
    assert '"kernel"' not in (tmp_path / "packed" / "config.json").read_text()
    assert torch.equal(load(tmp_path / "packed", kernel="packed", **whole).logits(TOKENS), loaded.logits(TOKENS))


def test_a_row_of_one_group_in_a_padded_layout(checkpoint):
    path = checkpoint("odd", strategy="channel")
    loaded, library = load(path, kernel="packed"), load(path, kernel="library", compute_dtype="float32")
    assert_verified(loaded)
    assert loaded.model.get_submodule(UP).format.group_size == -1
    for name, module in library.model.named_modules():
        if isinstance(module, CompressedLinear):
            assert torch.equal(loaded.model.get_submodule(name).dequantize(), module.dequantize())


def test_activations_of_int8_are_exact_and_adapters_train(checkpoint):
    path = checkpoint(weights="int8", dynamic_activations=True)
    loaded = load(path, kernel="packed")
    assert any("activations are not rounded" in note for note in loaded.notes)
    assert {layer.scheme for layer in loaded.layers if layer.quantized} == {"int8-dynamic"}
    assert_verified(loaded)
    assert any(map(torch.any, adapter_gradients(loaded.backend.prepare_for_training(loaded), TOKENS).values()))


@pytest.mark.parametrize("options", [{"group_size": 8}], ids=["eights"])
def test_what_has_no_place_stays(checkpoint, options):
    loaded = load(checkpoint(**options), kernel="packed")
    assert isinstance(loaded.model.get_submodule(UP), CompressedLinear)
    assert any("no place in the packed layout" in note for note in loaded.notes)
    assert_verified(loaded)
    expected = load(checkpoint(**options), kernel="library", compute_dtype="float32").logits(TOKENS)
    assert torch.equal(loaded.logits(TOKENS), expected)


def test_mxfp8_is_converted_as_it_is(checkpoint, tmp_path):
    source = checkpoint(weights="mxfp8")
    conversion = polyquant.convert(source, "compressed-tensors:weights=mxfp8", tmp_path / "out")
    assert conversion.exact and conversion.options["weights"] == "mxfp8"
    ours, theirs = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    for part in ("weight", "weight_scale"):
        assert torch.equal(*(tensors[f"{UP}.{part}"].view(torch.uint8) for tensors in (ours, theirs)))
