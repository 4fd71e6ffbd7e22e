"""Codes in strings of bytes: against the definition, bit by bit."""

import pytest
import torch
from polyquant.plugin.codes import packed_bits, unpacked_bits


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_code_is_where_the_definition_has_it(bits):
    codes = torch.randint(0, 2**bits, (3, 2, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    rows = packed_bits(codes, bits)
    assert rows.shape == (3, 2, 64 * bits // 8)
    assert rows.dtype == torch.uint8
    for row, own in zip(rows.flatten(0, 1), codes.flatten(0, 1), strict=True):
        whole = int.from_bytes(bytes(row.tolist()), "little")
        assert [(whole >> (place * bits)) & (2**bits - 1) for place in range(64)] == own.tolist()
    assert torch.equal(unpacked_bits(rows, bits), codes)
