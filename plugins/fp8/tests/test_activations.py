"""Emulated activations of FP8: by token, by block, by a stored scale, and FBGEMM's with its bound."""

import polyquant
import pytest
import torch
from polyquant.plugin import WeightInfo, activation_formats
from polyquant.plugin.activations import rounded
from polyquant.testing.checkpoints import assert_verified
from polyquant.testing.models import tiny_model
from polyquant_fp8._modules import Fp8Linear
from polyquant_fp8.options import FbgemmOptions, Fp8Options

from .conftest import LAYER, load

E4M3 = torch.float8_e4m3fn
WEIGHT = WeightInfo(name=f"{LAYER}.weight", shape=(512, 256), dtype="float32", role="linear", module="Linear")


def inputs():
    return torch.randn(6, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 2, 6)[:, None]


def by_hand(values, scales):
    return (values / scales).clamp(-448, 448).to(E4M3).float() * scales


def test_tokens_and_blocks_have_scales_of_their_own():
    values = inputs()
    token = Fp8Options(block_rows=0, block_columns=0).activations_of(WEIGHT)
    assert torch.equal(rounded(values, token), by_hand(values, values.abs().amax(1, keepdim=True) / 448))
    block = Fp8Options().activations_of(WEIGHT)
    halves = values.unflatten(1, (2, 128))
    wanted = by_hand(halves, halves.abs().amax(2, keepdim=True) / 448).flatten(1)
    assert torch.equal(rounded(values, block), wanted)
    powers = Fp8Options(scale_fmt="ue8m0").activations_of(WEIGHT)
    wanted = by_hand(halves, torch.exp2((halves.abs().amax(2, keepdim=True) / 448).log2().ceil())).flatten(1)
    assert torch.equal(rounded(values, powers), wanted)


def test_fbgemms_bound_cuts_what_is_above_it():
    how = FbgemmOptions(activation_scale_ub=50.0).activations_of(WEIGHT)
    values = inputs()
    scales = values.abs().amax(1, keepdim=True).clamp(max=50) / 448
    assert torch.equal(rounded(values, how), by_hand(values, scales))
    assert float(rounded(values, how).abs().max()) == 50 < float(values.abs().max())


@pytest.mark.parametrize("backend", ["fp8", "fbgemm-fp8"])
def test_layers_round_their_inputs(folder, backend):
    loaded = polyquant.load(
        tiny_model("qwen2", folder), backend, device="cpu", compute_dtype="float32", emulate_activations=True
    )
    layer = loaded.model.get_submodule(LAYER)
    how = loaded.config.activations_of(WEIGHT)
    wanted = torch.nn.functional.linear(rounded(inputs(), how), layer.dequantize(), layer.bias)
    torch.testing.assert_close(layer(inputs()), wanted, rtol=1e-4, atol=1e-4)
    assert loaded.emulated_activations == "fp8"
    assert_verified(loaded)


def test_a_stored_scale_is_one_for_all_inputs(changed):
    def with_scales(tensors):
        for name in [name for name in tensors if name.endswith("weight_scale_inv")]:
            tensors[name.replace("weight_scale_inv", "activation_scale")] = torch.tensor(0.02)

    path = changed(with_scales, lambda stored: stored.update(activation_scheme="static"))
    loaded, plain = load(path, emulate_activations=True), load(path)
    layer, same = (each.model.get_submodule(LAYER) for each in (loaded, plain))
    assert isinstance(layer, Fp8Linear)
    assert torch.equal(layer(inputs()), same(by_hand(inputs(), torch.tensor(0.02))))
    assert rounded(inputs(), activation_formats.FP8, layer.static_scale).abs().max() == pytest.approx(448 * 0.02)
    assert any("--emulate-activations" in note for note in plain.notes)
    assert not any("activations stay in" in note for note in loaded.notes)
