"""One layout for the weights of every format: bit for bit what the formulas say, compiled and in plain torch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import msgspec
import pytest
import torch
from polyquant.errors import EnvironmentProblem, ModelError
from polyquant.packed_weights import kernels
from polyquant.packed_weights.codes import codes_of
from polyquant.packed_weights.format import group_of_runs
from polyquant.types import PackedFormat
from polyquant.packed_weights.linear import MOST_INPUTS, RepackedLinear
from polyquant.packed_weights.weight import PARTS, PackedWeight, pack_weight, same
from torch.nn import Linear, functional

from .packing import random_weight

DTYPES = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}
SHAPES = ((64, 256), (7, 100), (8, 64), (50, 96), (1, 33))
FORMATS = (
    [
        PackedFormat(kind=kind, group_size=group, scale_dtype=scale, offsets=offsets)
        for kind, offsets, scale, group in itertools.product(
            ("affine4", "int8", "codebook4", "float8"), ("none", "zeros", "minima"), DTYPES, (16, 32, 64, -1)
        )
        if kind not in ("codebook4", "float8") or offsets == "none"
    ]
    + [
        PackedFormat(kind="affine4", group_size=32, scale_dtype="int8", offsets="minima", outer_group=64),
        PackedFormat(kind="int8", group_size=16, scale_dtype="int8", outer_group=64),
        PackedFormat(kind="int8", group_size=32, scale_dtype="int8", offsets="minima", outer_group=64),
    ]
    + [
        PackedFormat(kind=kind, group_size=group, offsets=offsets, column_scales=True)
        for kind, group, offsets in (("affine4", 64, "minima"), ("int8", 16, "zeros"), ("affine4", -1, "none"))
    ]
    + [
        PackedFormat(kind=kind, group_size=16, scale_dtype="float8_e4m3fn", row_scales=of_rows, offsets=offsets)
        for kind, offsets in (("codebook4", "none"), ("affine4", "none"), ("affine4", "minima"), ("float8", "none"))
        for of_rows in ("none", "multiply", "divide")
    ]
)
SETS = ["plain torch", *(kernels.library().available() if kernels.library() else ())]


@pytest.fixture(params=SETS)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What multiplies: plain torch, or each set of instructions that this processor has."""
    if request.param == "plain torch":
        monkeypatch.setattr(kernels, "library", lambda: None)
        yield request.param
        return
    library = kernels.library().library()
    assert library.pq_use(request.param.encode()) == 0
    yield request.param
    library.pq_use(kernels.library().available()[0].encode())


def layer_of(weight: PackedWeight, bias: bool = True) -> RepackedLinear:
    torch.manual_seed(1)
    linear = Linear(weight.shape[1], weight.shape[0], bias=bias)
    return RepackedLinear(weight, linear.bias, "int4", 4)


@pytest.mark.parametrize(
    "layout",
    FORMATS,
    ids=lambda layout: (
        f"{layout.kind}-{layout.offsets}-{layout.scale_dtype}-{layout.group_size}"
        + ("-columns" if layout.column_scales else "")
        + ("" if layout.row_scales == "none" else f"-rows-{layout.row_scales}")
    ),
)
def test_it_decodes_to_the_bits_of_its_formula_and_multiplies_with_them(
    layout: PackedFormat, instructions: str
) -> None:
    for shape in SHAPES:
        if layout.outer_group and shape[1] % layout.outer_group:
            continue
        weight, dense, codes, scales = random_weight(shape, layout)
        assert weight.format == layout
        assert sum(part.nbytes for part in weight.parts.values()) == layout.nbytes(shape)
        layer = layer_of(weight)
        assert torch.equal(layer.dequantize(), dense)
        for inputs in (torch.randn(3, shape[1]), torch.randn(shape[1]), torch.randn(2, MOST_INPUTS, shape[1])):
            wanted = functional.linear(inputs.double(), dense.double(), layer.bias.double())
            terms = functional.linear(inputs.abs(), dense.abs())  # whose sum may cancel
            assert (layer(inputs) - wanted).norm() <= 5e-5 * terms.norm()


def test_groups_that_do_not_divide_the_columns_are_kept_in_parts() -> None:
    layout = PackedFormat(kind="float8", group_size=128, scale_dtype="float32")
    weight, dense, codes, scales = random_weight((16, 576), layout)
    assert weight.padded == (16, 576)  # nothing is padded: whole steps multiply with it
    assert (weight.group, weight.scales.shape) == (64, (2, 9, 8))
    assert layout.nbytes((16, 576)) == 16 * 576 + 16 * 9 * 4
    again = codes_of("layer", weight)
    assert (again.group_size, again.scales.shape) == (128, (16, 5))  # as the format has them
    assert torch.equal(again.scales, scales)
    assert PackedFormat(kind="float8", group_size=128).padded((16, 560)) == (16, 640)  # whole blocks of 32 columns


@pytest.mark.parametrize("activations", list(kernels.ACTIVATIONS))
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_activations_and_dtypes(activations: str, dtype: str, instructions: str) -> None:
    weight, dense, *_ = random_weight((64, 256), PackedFormat(kind="affine4", group_size=32))
    layer = layer_of(weight)
    layer.activations = activations
    layer.bias.data = layer.bias.data.to(getattr(torch, dtype))
    inputs = torch.randn(5, 256).to(getattr(torch, dtype))
    outputs = layer(inputs)
    wanted = functional.linear(inputs.double(), dense.double(), layer.bias.double())
    bound = max(DTYPES[dtype], {"float32": 2e-6, "int16": 3e-4, "int8": 4e-2}[activations])
    assert outputs.dtype == inputs.dtype and (outputs - wanted).norm() <= bound * wanted.norm()


def test_inputs_of_any_form(instructions: str) -> None:
    weight, dense, *_ = random_weight((64, 256), PackedFormat(kind="affine4", group_size=32))
    layer = layer_of(weight, bias=False)
    inputs = torch.randn(6, 512)[:, ::2]  # not contiguous
    assert torch.allclose(layer(inputs), inputs @ dense.T, atol=1e-3, rtol=1e-3)
    assert layer(torch.randn(0, 256)).shape == (0, 64)
    assert layer(torch.randn(2, 0, 256)).shape == (2, 0, 64)
    assert layer(torch.randn(2, 256).double()).dtype == torch.float64
    assert layer(torch.full((1, 256), 6e4, dtype=torch.float16)).isinf().any()  # overflows, as float16 does
    assert layer(torch.full((1, 256), float("nan"))).isnan().all()


def test_scales_that_are_no_numbers_show(instructions: str) -> None:
    codes = torch.full((16, 64), 9, dtype=torch.uint8)
    scales = torch.ones(16, 2)
    scales[3, 0], scales[5, 1] = float("nan"), float("inf")
    outputs = layer_of(pack_weight(codes, scales, 32, zero=8.0), bias=False)(torch.ones(1, 64))
    assert not outputs[0, [3, 5]].isfinite().any()
    assert outputs[0, [0, 1, 2, 4, 6, 7]].isfinite().all()


def test_columns_in_another_order(instructions: str) -> None:
    groups = (torch.arange(256) // 64)[torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    codes = torch.randint(0, 16, (16, 256), dtype=torch.uint8)
    scales = torch.rand(16, 4).half()
    weight = pack_weight(codes, scales, 64, zero=8.0, groups_of_columns=groups)
    dense = scales.float()[:, groups] * (codes.float() - 8)
    assert weight.format.ordered
    assert torch.equal(layer_of(weight).dequantize(), dense)
    assert sum(part.nbytes for part in weight.parts.values()) == weight.format.nbytes((16, 256))
    for count in (1, 3, MOST_INPUTS + 1):
        inputs = torch.randn(count, 256)
        assert torch.allclose(layer_of(weight, bias=False)(inputs), inputs @ dense.T, atol=1e-2)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_columns_with_scales_of_their_own(dtype: str, instructions: str) -> None:
    groups = (torch.arange(256) // 64)[torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    codes, scales = torch.randint(0, 16, (16, 256), dtype=torch.uint8), torch.rand(16, 4).half()
    column_scales = (torch.rand(256) * 4 + 0.1).half()
    weight = pack_weight(codes, scales, 64, zero=8.0, groups_of_columns=groups, column_scales=column_scales)
    dense = scales.float()[:, groups] * (codes.float() - 8) * column_scales.float()
    layer, inputs = layer_of(weight), torch.randn(3, 256).to(getattr(torch, dtype)).requires_grad_()
    layer.bias.data = layer.bias.data.to(inputs.dtype)
    assert torch.equal(layer.dequantize(), dense)
    outputs = layer(inputs)
    outputs.backward(torch.ones_like(outputs))
    wanted = functional.linear(inputs.double(), dense.double(), layer.bias.double())
    assert outputs.dtype == inputs.dtype and (outputs - wanted).norm() <= max(DTYPES[dtype], 1e-4) * wanted.norm()
    assert torch.allclose(inputs.grad, dense.sum(0).expand(3, -1).to(inputs.dtype), rtol=0.05, atol=0.5)


@pytest.mark.parametrize("groups", ([0] * 64, [0] * 31 + [1] * 33, [-1] * 32 + [1] * 32, [0] * 32 + [2] * 32))
def test_columns_that_come_in_no_whole_groups_are_refused(groups: list[int]) -> None:
    codes = torch.zeros(8, 64, dtype=torch.uint8)
    with pytest.raises(ModelError, match="whole groups of 32"):
        pack_weight(codes, torch.ones(8, 2), 32, zero=8.0, groups_of_columns=torch.tensor(groups))


def test_parts_that_do_not_fit_are_refused() -> None:
    codes = torch.zeros(8, 64, dtype=torch.uint8)
    with pytest.raises(ModelError, match=r"scales are \(8, 3\), and 8 rows of 2 groups"):
        pack_weight(codes, torch.ones(8, 3), 32)
    with pytest.raises(ModelError, match="groups of 8 columns in 64 have no place"):
        pack_weight(codes, torch.ones(8, 8), 8)
    with pytest.raises(ModelError, match="zeros are"):
        pack_weight(codes, torch.ones(8, 2), 32, zeros=torch.ones(8))
    with pytest.raises(ModelError, match=r"column_scales are \(63,\), and there are 64 columns"):
        pack_weight(codes, torch.ones(8, 2), 32, column_scales=torch.ones(63))
    small = torch.ones(8, 2).to(torch.float8_e4m3fn)
    with pytest.raises(
        ModelError, match=r"row_scales are \(8,\) beside scales of torch.float8_e4m3fn, and 8 rows have one"
    ):
        pack_weight(codes, small, 32, row_scales=torch.ones(8))
    with pytest.raises(ModelError, match="beside scales of torch.float32"):
        pack_weight(codes, torch.ones(8, 2), 32, row_scales=torch.ones(8, 1))


def test_gradients_are_those_of_the_dense_weight(instructions: str) -> None:
    weight, dense, *_ = random_weight((64, 256), PackedFormat(kind="int8", group_size=-1))
    layer, inputs = layer_of(weight), torch.randn(5, 256, requires_grad=True)
    gradient = torch.randn(5, 64)
    layer(inputs).backward(gradient)
    assert torch.allclose(inputs.grad, gradient @ dense, rtol=1e-3, atol=1e-3)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_copies_and_moved_tensors_are_multiplied_with(instructions: str) -> None:
    weight, dense, *_ = random_weight((64, 256), PackedFormat(kind="affine4", group_size=32, offsets="minima"))
    layer, inputs = layer_of(weight), torch.randn(2, 256)
    before = layer(inputs)
    other = copy.deepcopy(layer)
    other.scales.data.mul_(2)
    other.minima.data = other.minima.data * 2
    assert torch.equal(layer(inputs), before)
    assert torch.allclose(other(inputs) - other.bias, 2 * (before - layer.bias), atol=1e-2)
    assert not same(layer.packed, other.packed) and same(layer.packed, copy.deepcopy(layer).packed)


@pytest.mark.parametrize(
    "layout",
    [
        PackedFormat(kind="codebook4", group_size=32, scale_dtype="float32", column_scales=True),
        PackedFormat(kind="codebook4", group_size=16, scale_dtype="float8_e4m3fn", row_scales="multiply"),
    ],
    ids=["columns", "nvfp4"],
)
def test_compilers_see_one_operator(layout: PackedFormat, instructions: str) -> None:
    weight, *_ = random_weight((50, 96), layout)
    layer, inputs = layer_of(weight), torch.randn(2, 3, 96)
    with torch.inference_mode():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(inputs), layer(inputs))
    parts = [getattr(layer, name, None) for name in (*PARTS[2:], "bias")]
    arguments = (inputs, layer.qweight, layer.scales, *parts, 0.0, 50, msgspec.json.encode(layout).decode(), "int16")
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if layout.scale_dtype != "float8_e4m3fn":  # torch's own check multiplies all tensors, and has no product of these
        checks += ("test_schema",)
    torch.library.opcheck(torch.ops.polyquant.packed_linear.default, arguments, test_utils=checks)


def test_floats_that_are_no_numbers_are_refused() -> None:
    codes = torch.ones(8, 32).to(torch.float8_e4m3fn)
    codes[3, 5] = float("nan")
    with pytest.raises(ModelError, match="some of its weights are NaN"):
        pack_weight(codes, torch.ones(8, 1))
    scales = torch.ones(8, 2).to(torch.float8_e4m3fn)
    scales[1, 1] = float("nan")
    with pytest.raises(ModelError, match="some of its scales are NaN"):
        pack_weight(torch.zeros(8, 32, dtype=torch.uint8), scales, 16)


def test_groups_of_blocks_that_go_on_in_the_next_row() -> None:
    assert [group_of_runs(64, columns) for columns in (64, 128, 96, 48, 40, 576)] == [64, 64, 32, 16, 0, 64]


def test_an_older_library_is_refused_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("polyquant_kernels")
    import polyquant_kernels

    kernels.library.cache_clear()
    monkeypatch.setattr(polyquant_kernels, "INTERFACE", 1)
    with pytest.raises(EnvironmentProblem, match="has interface 1.*pip install --upgrade polyquant-kernels"):
        kernels.library()
    assert "has interface 1" in kernels.told()
    monkeypatch.undo()
    kernels.library.cache_clear()
    assert kernels.library() is polyquant_kernels
    assert kernels.told() == f"packed kernels: polyquant-kernels {polyquant_kernels.__version__}, {SETS[1]}"
    monkeypatch.setattr(kernels, "library", lambda: None)
    assert "slowly: pip install polyquant-kernels" in kernels.told()


@pytest.mark.parametrize("borrowed", [True, False])
def test_products_without_memory_are_an_error_and_leave_threads_that_work(borrowed: bool) -> None:
    import ctypes

    lender = pytest.importorskip("polyquant_kernels")
    weight, *_ = random_weight((2048, 64), PackedFormat(kind="affine4", group_size=32))
    layer, inputs = layer_of(weight, bias=False), torch.randn(2, 64)
    struct, wanted, count = kernels.weight_struct(weight), layer(inputs), 2**43  # inputs, in more than can be addressed
    assert lender.borrow_threads(ctypes.CDLL(torch._C.__file__) if borrowed else None) is borrowed
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        called = kernels.functions().pq_linear
        asked = (kernels.address_of(struct), inputs.data_ptr(), 0, count, wanted.data_ptr(), 0, None, 1, 2)
        with pytest.raises(MemoryError, match="no memory for a product"):
            kernels.require(called(*asked))
        assert torch.equal(layer(inputs), wanted)
    finally:
        torch.set_num_threads(threads)
        lender.borrow_threads(ctypes.CDLL(torch._C.__file__))


@pytest.mark.parametrize("borrowed", [True, False])
def test_threads_and_forks_multiply_alike(borrowed: bool) -> None:
    """Several callers at once, and a child of a process whose threads have worked: torch's, and the kernels' own."""
    import ctypes
    import os
    from concurrent.futures import ThreadPoolExecutor

    lender = pytest.importorskip("polyquant_kernels")
    kernels.functions()
    assert lender.borrow_threads(ctypes.CDLL(torch._C.__file__) if borrowed else None) is borrowed
    weight, *_ = random_weight((2048, 1024), PackedFormat(kind="affine4", group_size=32))
    layer = layer_of(weight)
    inputs = [torch.randn(2, 1024) for _ in range(8)]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        wanted = [layer(each) for each in inputs]
        with ThreadPoolExecutor(4) as pool:
            assert all(map(torch.equal, pool.map(layer, inputs), wanted))
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(layer(inputs[0]), wanted[0]) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(threads)
        lender.borrow_threads(ctypes.CDLL(torch._C.__file__))
