"""Words of GPTQ and AWQ read into the packed layout, bit for bit what the formats' formulas say of every weight."""

from itertools import product

import pytest
import torch
from polyquant.errors import ModelError
from polyquant.plugin import WeightInfo
from polyquant.plugin.layouts import packed_format
from polyquant.plugin.packing import pack_awq, pack_gptq

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of eight, as they lie in a word from its lowest bits up


def words(codes, bits, order=None):
    """int32 words (rows, columns * bits / 32), each the sum of its codes' powers; order: of the codes in a word."""
    held = 32 // bits
    order = range(held) if order is None else order
    sums = [
        [sum(row[first + column] << (bits * place) for place, column in enumerate(order)) for first in range(0, len(row), held)]
        for row in codes.tolist()
    ]  # fmt: skip
    return torch.tensor([[word - (word >> 31 << 32) for word in row] for row in sums], dtype=torch.int32)


def parts(shape, bits, group_size, *, sym=False, ordered=False, dtype=torch.float16):
    """Codes (in, out), zero points and scales (groups, out), the group of each column, and the weight (out, in)."""
    torch.manual_seed(0)
    rows, columns = shape
    size = columns if group_size == -1 else group_size
    codes = torch.randint(0, 2**bits, (columns, rows))
    groups = torch.arange(columns) // size
    if ordered:
        groups = groups[torch.randperm(columns)]
    zeros = torch.randint(1, 2**bits, (columns // size, rows))
    if sym:
        zeros[:] = 2 ** (bits - 1)
    scales = (torch.rand(columns // size, rows) * 0.1 + 1e-3).to(dtype)
    weight = torch.empty(rows, columns)
    for row, column in product(range(rows), range(columns)):
        group = groups[column]
        weight[row, column] = scales[group, row].float() * float(codes[column, row] - zeros[group, row])
    return codes, zeros, scales, groups.int(), weight


def assert_holds(packed, weight, bits, group_size, *, sym, ordered, dtype):
    """The weight, bit for bit, its scales as they are stored, and in the layout that is planned for it."""
    info = WeightInfo(
        name="up_proj.weight", shape=tuple(weight.shape), dtype="float32", role="linear", module="Linear",
        parts={"scales": str(dtype).removeprefix("torch.")},
    )  # fmt: skip
    assert packed.format == packed_format(info, bits, group_size, sym=sym, ordered=ordered)
    assert packed.scales.dtype == dtype
    assert packed.shape == tuple(weight.shape)
    assert torch.equal(packed.decode(), weight)
    assert sum(part.nbytes for part in packed.parts.values()) == packed.format.nbytes(packed.shape)


@pytest.mark.parametrize("less_one", [False, True], ids=["gptq_v2", "gptq"])
@pytest.mark.parametrize("ordered", [False, True], ids=["", "ordered"])
@pytest.mark.parametrize("sym", [False, True], ids=["", "sym"])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, -1), (8, 64), (8, -1), (4, 128)])
def test_gptq(bits, group_size, sym, ordered, less_one):
    codes, zeros, scales, groups, weight = parts((24, 128), bits, group_size, sym=sym, ordered=ordered)
    qzeros = words(zeros - int(less_one), bits)
    packed = pack_gptq(
        words(codes.T, bits).T, qzeros, scales, groups, bits, group_size, sym=sym, ordered=ordered, less_one=less_one
    )
    assert_holds(packed, weight, bits, group_size, sym=sym, ordered=ordered, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sym", [False, True], ids=["", "sym"])
@pytest.mark.parametrize(("shape", "group_size"), [((16, 64), 32), ((40, 48), 16), ((8, 50), -1)])
def test_awq(shape, group_size, sym, dtype):
    codes, zeros, scales, _, weight = parts(shape, 4, group_size, sym=sym, dtype=dtype)
    qweight, qzeros = (words(each, 4, AWQ_COLUMNS) for each in (codes, zeros))
    packed = pack_awq(qweight, qzeros, scales, group_size, sym=sym)
    assert_holds(packed, weight, 4, group_size, sym=sym, ordered=False, dtype=dtype)


@pytest.mark.parametrize("shape", [(8, 48), (40, 80)])
def test_gptq_in_groups_that_do_not_fill_the_last_block(shape):
    codes, zeros, scales, groups, weight = parts(shape, 4, 16)
    packed = pack_gptq(words(codes.T, 4).T, words(zeros, 4), scales, groups, 4, 16, sym=False)
    assert_holds(packed, weight, 4, 16, sym=False, ordered=False, dtype=torch.float16)


def test_a_zero_point_beyond_the_weights():
    """Stored less one, 15 is 16: four bits more than codes have, and a byte holds it; 256 is beyond every byte."""
    codes, zeros, scales, groups, weight = parts((8, 32), 4, 32)
    zeros[0, :4], scale = 16, scales.float()[0, :, None]
    weight = scale * (codes.T - zeros.T).float()
    packed = pack_gptq(words(codes.T, 4).T, words(zeros - 1, 4), scales, groups, 4, 32, sym=False, less_one=True)
    assert torch.equal(packed.decode(), weight)
    packed = pack_gptq(
        words(codes.T, 4).T, words(zeros - 1, 4), scales, groups, 4, 32, sym=False, less_one=True, wraps=True
    )
    assert torch.equal(packed.decode(), scale * (codes.T - zeros.T % 16).float())
    codes, zeros, scales, groups, weight = parts((8, 32), 8, 32)
    zeros[0, 3] = 256
    with pytest.raises(ModelError, match="a zero point of 256"):
        pack_gptq(words(codes.T, 8).T, words(zeros - 1, 8), scales, groups, 8, 32, sym=False, less_one=True)


def test_layers_that_are_not_what_the_config_says_are_refused():
    codes, zeros, scales, groups, _ = parts((8, 64), 4, 32, ordered=True)
    qweight, qzeros = words(codes.T, 4).T, words(zeros, 4)
    with pytest.raises(ModelError, match="zero points are fitted"):
        pack_gptq(qweight, qzeros, scales, groups, 4, 32, sym=True, ordered=True)
    with pytest.raises(ModelError, match="columns are reordered"):
        pack_gptq(qweight, qzeros, scales, groups, 4, 32, sym=False)
    with pytest.raises(ModelError, match="whole groups of 32"):
        pack_gptq(qweight, qzeros, scales, groups.clamp(max=0), 4, 32, sym=False, ordered=True)
    with pytest.raises(ModelError, match="zero points are fitted"):
        pack_awq(words(codes, 4), qzeros, scales, 32, sym=True)


def test_what_has_no_place():
    info = WeightInfo(name="up_proj.weight", shape=(16, 48), dtype="float32", role="linear", module="Linear")
    assert packed_format(info, 2, 16, sym=True) is None
    assert packed_format(info, 3, 16, sym=True) is None
    assert packed_format(info, 4, 16, sym=True, ordered=True) is None  # would have to be padded
    assert packed_format(info, 4, -1, sym=True, ordered=True).ordered is False  # one group has one order
    assert packed_format(info, 8, 16, sym=False).offsets == "zeros"
