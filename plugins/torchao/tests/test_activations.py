"""What the core rounds activations to, for every backend, is what torchao's tensors of the same formats hold."""

from __future__ import annotations

import pytest
import torch
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

from polyquant.plugin import Activations, activation_formats
from polyquant.plugin.activations import rounded

EVEN = activation_formats.MXFP4._replace(exponents="even")
MX = {
    "mxfp8": (activation_formats.MXFP8, torch.float8_e4m3fn, ScaleCalculationMode.RCEIL),
    "mxfp4": (activation_formats.MXFP4, torch.float4_e2m1fn_x2, ScaleCalculationMode.FLOOR),
    "mxfp4-even": (EVEN, torch.float4_e2m1fn_x2, ScaleCalculationMode.EVEN),
}


def inputs() -> torch.Tensor:
    """Tokens of different sizes, one column of outliers, a block of zeros."""
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 64)[:, None]
    values[:, 9] *= 40
    values[2, :32] = 0
    return values


@pytest.mark.parametrize("name", MX)
def test_mx_formats_as_torchao_has_them(name: str) -> None:
    how, dtype, mode = MX[name]
    wanted = MXTensor.to_mx(inputs(), dtype, block_size=32, scaling_mode=mode).dequantize(torch.float32)
    assert torch.equal(rounded(inputs(), how), wanted)


def test_nvfp4_as_torchao_has_it() -> None:
    scale = per_tensor_amax_to_scale(inputs().abs().max())
    wanted = NVFP4Tensor.to_nvfp4(inputs(), per_tensor_scale=scale).dequantize(torch.float32)
    for found in (rounded(inputs(), activation_formats.NVFP4), rounded(inputs(), activation_formats.NVFP4, scale)):
        assert float((found - wanted).abs().max()) <= 2e-7 * float(wanted.abs().max())


def test_a_format_is_named_with_its_blocks() -> None:
    assert isinstance(EVEN, Activations)
    assert (str(EVEN), str(activation_formats.INT8)) == ("mxfp4 (e2m1, blocks of 32)", "int8 (int8, each token)")
