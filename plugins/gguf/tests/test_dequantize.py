"""Every block type against gguf.quants: blocks of random bytes, so that every field takes every value."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from polyquant.plugin.gguf import TYPES
from polyquant.testing.gguf_files import random_blocks
from polyquant_gguf._decode import BLOCKS, dequantize
from polyquant.testing.oracles import agree

PACKED = [name for name, block in TYPES.items() if block.packed]
QUANTIZABLE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]


def test_sizes_are_ggmls() -> None:
    for name, block in TYPES.items():
        kind = GGMLQuantizationType[name]
        assert (block.id, (block.elements, block.nbytes)) == (kind.value, gguf.GGML_QUANT_SIZES[kind])


def test_every_type_gguf_dequantizes_is_there() -> None:
    assert {kind.name for kind in quants._type_traits} == set(PACKED) | {"BF16"}
    assert set(BLOCKS) == set(PACKED)


@pytest.mark.parametrize("name", PACKED)
def test_random_blocks_bit_for_bit(name: str) -> None:
    blocks = random_blocks(name, 3 * 512)
    rows = blocks.reshape(512, -1)
    expected = quants.dequantize(rows, GGMLQuantizationType[name])
    found = dequantize(torch.from_numpy(rows.copy()), TYPES[name], torch.float32)
    assert found.shape == (512, 3 * TYPES[name].elements)
    assert np.isfinite(expected).all()
    agree("gguf", "gguf's dequantize", found, torch.from_numpy(expected))


@pytest.mark.parametrize("name", QUANTIZABLE)
def test_quantized_weights_bit_for_bit(name: str) -> None:
    weights = np.random.default_rng(3).normal(0, 0.05, (16, 512)).astype(np.float32)
    rows = quants.quantize(weights, GGMLQuantizationType[name])
    found = dequantize(torch.from_numpy(rows), TYPES[name], torch.float32)
    np.testing.assert_array_equal(found.numpy(), quants.dequantize(rows, GGMLQuantizationType[name]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_round_the_float32_result_once(dtype: torch.dtype) -> None:
    rows = torch.from_numpy(random_blocks("Q4_K", 8))
    exact = dequantize(rows, TYPES["Q4_K"], torch.float32)
    assert torch.equal(dequantize(rows, TYPES["Q4_K"], dtype), exact.to(dtype))
