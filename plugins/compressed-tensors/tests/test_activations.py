"""Rounded activations: the core's numbers are the library's own, and a load with them says that they are emulated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from compressed_tensors.quantization.utils.helpers import generate_gparam
from polyquant.errors import ConfigError
from polyquant.plugin.activations import rounded
from polyquant_compressed_tensors.arguments import activations_beside

from .conftest import load

FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": True, "observer": None}
BYTE = {"num_bits": 8, "symmetric": True, "dynamic": True, "observer": None}
NVFP4 = {**FLOAT4, "dynamic": "local", "strategy": "tensor_group", "group_size": 16}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "int8": ("int8", "channel", {**BYTE, "type": "int", "strategy": "token"}),
    "fp8": ("fp8", "channel", {**BYTE, "type": "float", "strategy": "token"}),
    "fp8-block": ("fp8", "block", {**BYTE, "type": "float", "strategy": "group", "group_size": 128}),
    "mxfp8": ("mxfp8", "group", {**BYTE, "type": "float", "strategy": "group", "group_size": 32,
                                 "scale_dtype": torch.uint8, "zp_dtype": torch.uint8}),
    "mxfp4": ("mxfp4", "group", {**FLOAT4, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8,
                                 "zp_dtype": torch.uint8}),
    "nvfp4": ("nvfp4", "tensor_group", {**NVFP4, "scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}),
}  # fmt: skip


def inputs() -> torch.Tensor:
    """Tokens of very different sizes, with outliers, zeros, and ties of every format."""
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    values *= torch.logspace(-1, 1.5, 64)[:, None]
    values[:, 7] *= 30
    values[3, :128] = 0
    values[5, :16] = torch.tensor([6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -0.25, -5, -2.5, 0, 0, 1, 2, 4.0])
    return values[None]  # of a batch: the library takes one scale for each of the first two axes


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_as_the_library_rounds(name: str, dtype: torch.dtype) -> None:
    weights, strategy, arguments = CASES[name]
    how = activations_beside(weights, strategy, symmetric=True)
    assert how is not None
    how = how._replace(computed="inputs", outer="divides")
    values, args = inputs().to(dtype), QuantizationArgs(**arguments)
    factor = generate_gparam(values.min(), values.max()) if name == "nvfp4" else None
    scales, zeros = compute_dynamic_scales_and_zp(values, args, torch.nn.Identity(), global_scale=factor)
    wanted = fake_quantize(values, scales, zeros, args, global_scale=factor)
    assert torch.equal(rounded(values, how, factor), wanted.to(dtype))
    assert not torch.equal(wanted, values)


def test_integers_without_kernels_that_round_activations_have_none() -> None:
    assert activations_beside("int4", "group", symmetric=True) is None
    assert activations_beside("int8", "group", symmetric=True) is None
    assert activations_beside("int8", "channel", symmetric=False) is None


@pytest.mark.parametrize("weights", ["int8", "fp8", "mxfp4"])
def test_weights_alone_emulated_are_the_checkpoint_that_rounds_activations(checkpoint: Any, weights: str) -> None:
    how = {"compute_dtype": "float32", "kernel": "decode"}
    emulated = load(checkpoint(weights=weights), emulate_activations=True, **how)
    plain = load(checkpoint(weights=weights), **how)
    rounds = load(checkpoint(weights=weights, dynamic_activations=True), **how)
    found, exact, wanted = (each.logits([3, 4, 5, 6, 7, 8, 9]) for each in (emulated, plain, rounds))
    assert emulated.emulated_activations == weights
    step = float((wanted - exact).abs().mean())
    assert step > 1e-3
    assert float((found - wanted).abs().mean()) < 0.1 * step
    with pytest.raises(ConfigError, match="rounds activations itself"):
        load(checkpoint(weights=weights, dynamic_activations=True), emulate_activations=True)


def test_int4_has_no_kernels_that_round_activations(checkpoint: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"compressed-tensors's format \(int4\) multiply with activations as they are"
    ):
        load(checkpoint(), emulate_activations=True)
