"""What holds for GPTQ and AWQ alike: damaged checkpoints, dense ones, odd sizes, models that cannot be quantized."""

import polyquant
import pytest
from polyquant.errors import CheckpointConflict, ConfigError, ModelError
from polyquant.testing.checkpoints import assert_verified
from polyquant.testing.models import tiny_model
from polyquant.testing.texts import CALIBRATION
from safetensors.torch import load_file, save_file

UP = "model.layers.1.mlp.up_proj"
PLAIN = {"gptq": "gptqmodel TorchLinear", "awq": "gptqmodel AwqTorchLinear"}
FAST = {"gptq": "gptqmodel TorchAtenLinear", "awq": "gptqmodel TorchAtenAwqLinear"}
WORDS = {"gptq": "90 x 90", "awq": "out_features 90"}


@pytest.fixture(scope="module", params=["gptq", "awq"])
def method(request):
    return request.param


def load(path, **options):
    return polyquant.load(path, device="cpu", **options)


def quantize(model, method, out, calibration=CALIBRATION, **options):
    return polyquant.quantize(model, method, out, calibration=calibration, device="cpu", **options)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_damaged_checkpoints_name_the_tensor(copy, part, packing):
    def cut(tensors):
        tensors[f"{UP}.{part}"] = tensors[f"{UP}.{part}"][:-1].contiguous()

    packing.change_tensors(copy, cut)
    with pytest.raises(ModelError, match=rf"{UP} cannot be read: {part} of a layer .* should be"):
        load(copy)
    packing.change_tensors(copy, lambda tensors: tensors.pop(f"{UP}.{part}"))
    with pytest.raises(ModelError, match=rf"{UP} cannot be read: {part} is missing; it has"):
        load(copy)


def test_dense_checkpoints(folder, copy, method):
    dense = tiny_model("llama", folder)
    with pytest.raises(CheckpointConflict, match=f"is dense, and {method} loads quantized checkpoints only"):
        load(dense, backend=method)
    save_file(load_file(dense / "model.safetensors"), copy / "model.safetensors")
    with pytest.raises(ModelError, match=r"its config says that it is quantized, and no tensor in it is"):
        load(copy)


def test_a_layer_of_a_size_that_the_int4_matmul_does_not_take_is_unpacked(folder, tmp_path, packing, method):
    model = packing.with_odd_sizes(folder, tmp_path / "model")
    loaded = load(packing.writers[method](model, tmp_path / "out", group_size=32))
    assert loaded.kernel == ", ".join(sorted((PLAIN[method], FAST[method])))
    assert_verified(loaded)
    kernels = {layer.name: layer.kernel for layer in loaded.layers if layer.quantized}
    assert kernels["model.layers.0.self_attn.k_proj.weight"] == PLAIN[method]
    assert kernels["model.layers.0.self_attn.q_proj.weight"] == FAST[method]


def test_calibration_that_is_not_enough(folder, tmp_path, method):
    with pytest.raises(ConfigError, match="the calibration text has . tokens, at least 256 are needed"):
        quantize(tiny_model("llama", folder), method, tmp_path / "out", ("Hi!",))
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_quantized_name_the_layer(folder, tmp_path, method):
    with pytest.raises(ConfigError, match=r"64 does not divide in_features 90 in model\.layers\.0\.self_attn\.q_proj"):
        quantize(tiny_model("odd", folder), method, tmp_path / "out", group_size=64)
    with pytest.raises(ConfigError, match=f"words hold 8 weights, which does not divide {WORDS[method]}"):
        quantize(tiny_model("odd", folder), method, tmp_path / "out", group_size=-1)
    with pytest.raises(ConfigError, match=r"experts\.gate_up_proj is no Linear module but MixtralExperts"):
        quantize(tiny_model("mixtral", folder), method, tmp_path / "out")
    assert not (tmp_path / "out").exists()
