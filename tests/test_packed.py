"""Packed checkpoints: which layers are quantized shows in their tensors; gradients through frozen weights."""

import pytest
import torch
from polyquant import hf, packed
from polyquant.errors import ModelError
from polyquant.frozen import differentiable
from polyquant.memory.weights import list_weights
from polyquant.models.resolve import resolve
from polyquant.options import BackendOptions
from polyquant.testing.models import tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return resolve(tiny_model("llama", tmp_path_factory.mktemp("models")))


def test_the_tensors_say_what_is_dense(source):
    weights = list_weights(hf.skeleton(source, "float32"))
    linears = {weight.name.rpartition(".")[0] for weight in weights if weight.role == "linear"}
    usual = BackendOptions()
    assert packed.with_stored_skips(usual, weights, linears, source) == (usual, [])
    down = {name for name in linears if name.endswith("down_proj")}
    config, notes = packed.with_stored_skips(usual, weights, linears - down, source)
    assert set(config.skip) == down | {"lm_head"} and not config.skip_defaults
    assert notes == [f"3 layers are dense in the checkpoint: {', '.join(config.skip)}"]
    config, notes = packed.with_stored_skips(usual, weights, linears | {"lm_head"}, source)
    assert (config.skip, config.skip_defaults, notes) == ((), False, [])
    with pytest.raises(ModelError, match="2 packed layers have no Linear module in the model: a, b"):
        packed.with_stored_skips(usual, weights, linears | {"b", "a"}, source)
    with pytest.raises(ModelError, match="says that it is quantized, and no tensor in it is"):
        packed.with_stored_skips(usual, weights, set(), source)


def test_packed_modules_are_found_by_their_tensors(source):
    assert packed.packed_modules(source, ("qweight",)) == set()
    assert "model.layers.1.mlp.up_proj" in packed.packed_modules(source, ("qweight", "weight"))


def test_a_gradient_passes_a_matmul_that_has_none():
    weight = torch.randn(6, 4)
    inputs = torch.randn(3, 6, requires_grad=True)

    def multiply(rows):
        with torch.no_grad():
            return rows @ weight

    outputs = differentiable(multiply, inputs)
    outputs.backward(gradient := torch.randn(3, 4))
    torch.testing.assert_close(outputs, inputs @ weight)
    torch.testing.assert_close(inputs.grad, gradient @ weight.T)
