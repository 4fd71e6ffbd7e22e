"""Packed layers against compressed-tensors' own decompression, and against float64; every layout that is read."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from polyquant.errors import ConfigError
from polyquant.plugin import E2M1
from polyquant_compressed_tensors._kernels import Int4PackLinear
from polyquant_compressed_tensors._layers import packed_linear
from polyquant_compressed_tensors._library import quantization_scheme
from polyquant_compressed_tensors.arguments import FIXED_GROUPS
from polyquant_compressed_tensors.options import CompressedTensorsOptions
from polyquant_compressed_tensors.planning import SCALE, checkpoint_tensors, held_tensors, quantized_bytes
from polyquant.types import WeightInfo
from polyquant.testing.oracles import agree

LAYOUTS = {
    "int4": {},
    "int4-asymmetric": {"symmetric": False},
    "int4-channel": {"strategy": "channel"},
    "int4-channel-asymmetric": {"strategy": "channel", "symmetric": False},
    "int8": {"weights": "int8"},
    "int8-asymmetric": {"weights": "int8", "symmetric": False},
    "int8-group": {"weights": "int8", "group_size": 32},
    "int8-group-asymmetric": {"weights": "int8", "group_size": 32, "symmetric": False},
    "fp8": {"weights": "fp8"},
    "fp8-tensor": {"weights": "fp8", "strategy": "tensor"},
    "fp8-block": {"weights": "fp8", "strategy": "block"},
    "mxfp8": {"weights": "mxfp8"},
    "mxfp4": {"weights": "mxfp4"},
    "nvfp4": {"weights": "nvfp4"},
}
GROUPLESS = [name for name in LAYOUTS if "channel" in name or name in ("int8", "int8-asymmetric", "fp8", "fp8-tensor")]
CASES = [(name, (96, 256)) for name in LAYOUTS] + [
    (name, shape) for name in GROUPLESS for shape in ((203, 90), (90, 203))
]


def random_tensors(shape, options, dtype, plain):
    """Codes and scales of a layer as a checkpoint has them, with zeroed padding."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (size, kind) in checkpoint_tensors(shape, options, plain=plain).items():
        if name == "weight_shape":
            tensors[name] = torch.tensor(shape)
        elif kind == SCALE:
            tensors[name] = (torch.rand(size, generator=generator) * 0.01 + 0.001).to(dtype)
        elif kind == "float32":
            tensors[name] = torch.tensor([37.5])
        elif kind == "float8_e4m3fn":
            codes = torch.randint(0, 127, size, generator=generator, dtype=torch.uint8)
            negative = torch.randint(0, 2, size, generator=generator, dtype=torch.uint8) * 128
            tensors[name] = (codes if name == "weight_scale" else codes + negative).view(torch.float8_e4m3fn)
        elif kind == "uint8":
            low, high = (110, 130) if name == "weight_scale" else (0, 256)
            tensors[name] = torch.randint(low, high, size, generator=generator, dtype=torch.uint8)
        elif kind == "int8":
            tensors[name] = torch.randint(-128, 128, size, generator=generator, dtype=torch.int8)
        else:
            tensors[name] = torch.randint(-(2**31), 2**31 - 1, size, generator=generator, dtype=torch.int32)
    return tensors


def linear(shape, *, bias=False):
    return torch.nn.Linear(shape[1], shape[0], bias=bias, device="meta")


def formats(options):
    return {"int8": (True, False), "fp8": (True,), "mxfp8": (True,)}.get(options.weights, (False,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_the_weight_is_what_compressed_tensors_decompresses(name, shape, dtype):
    options = CompressedTensorsOptions(**LAYOUTS[name])
    for plain in formats(options):
        tensors = random_tensors(shape, options, dtype, plain)
        layer = packed_linear(linear(shape), options, dtype, tensors, plain=plain)
        layout = "naive-quantized" if plain and name != "mxfp8" else options.packed_format
        library = BaseCompressor.get_value_from_registry(layout)
        expected = library.decompress(tensors, quantization_scheme(options))["weight"]
        if name == "nvfp4" and dtype == torch.float16:  # the library goes through bfloat16
            torch.testing.assert_close(layer.dequantize().bfloat16(), expected, rtol=2**-7, atol=0)
        elif name == "mxfp8" and dtype == torch.float16:  # which does not hold all of these products
            torch.testing.assert_close(layer.dequantize().bfloat16(), expected, rtol=0, atol=2**-24)
        else:
            found = layer.dequantize().to(expected.dtype)
            agree("compressed-tensors", "compressed-tensors' decompress", found, expected)
        assert layer.dequantize().dtype == dtype
        assert tuple(layer.dequantize().shape) == shape


@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_are_planned_and_the_checkpoint_comes_back(name):
    options, shape = CompressedTensorsOptions(**LAYOUTS[name]), (96, 256)
    weight = WeightInfo(name="up_proj.weight", shape=shape, dtype="bfloat16", role="linear", module="Linear")
    for plain in formats(options):
        tensors = random_tensors(shape, options, torch.bfloat16, plain)
        layer = packed_linear(linear(shape), options, torch.bfloat16, dict(tensors), plain=plain)
        assert sum(tensor.nbytes for tensor in layer.parameters()) == quantized_bytes(weight, options)
        for held, (size, _) in held_tensors(shape, options).items():
            assert tuple(getattr(layer, held).shape) == size
        back = layer.checkpoint_tensors(plain=plain)
        assert back.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(back[key].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


def pack_mm(name, shape, *, bias=True):
    options = CompressedTensorsOptions(**LAYOUTS[name]).with_kernel("cpu", "bfloat16")
    assert options.kernel == "pack_mm"
    tensors = random_tensors(shape, options, torch.bfloat16, False)
    extra = {"bias": torch.randn(shape[0], generator=torch.Generator().manual_seed(1))} if bias else {}
    layer = packed_linear(linear(shape, bias=bias), options, torch.bfloat16, {**tensors, **extra}, plain=False)
    return (Int4PackLinear(layer) if name == "int4" else layer), layer, tensors


@pytest.mark.parametrize("rows", [(), (1,), (8,), (2, 5), (0, 3)], ids=str)
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_torch_s_packed_matmuls_give_the_product(name, rows):
    fast, plain, _ = pack_mm(name, (96, 256))
    inputs = torch.randn(*rows, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.no_grad():
        expected = inputs.double() @ plain.dequantize().double().T + plain.bias.double()
        found = fast(inputs)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-6, atol=2**-6 * 4)


def test_torch_s_int4_order_is_read_back():
    fast, plain, tensors = pack_mm("int4", (96, 256), bias=False)
    assert torch.equal(fast.dequantize(), plain.dequantize())
    back = fast.checkpoint_tensors(plain=False)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_gradients_pass_through_packed_matmuls(name):
    fast, plain, _ = pack_mm(name, (96, 256))
    inputs = torch.randn(3, 256).bfloat16().requires_grad_()
    fast(inputs).sum().backward()
    expected = torch.ones(3, 96).bfloat16() @ plain.dequantize()
    torch.testing.assert_close(inputs.grad, expected, rtol=2**-6, atol=2**-6)


def test_kernels():
    int4 = CompressedTensorsOptions()
    assert int4.with_kernel("cpu", "bfloat16").kernel == "pack_mm"
    for other in (int4.with_kernel("cpu", "float32"), int4.with_kernel("cuda", "bfloat16")):
        assert other.kernel == "decode"
    assert CompressedTensorsOptions(kernel="decode").with_kernel("cpu", "bfloat16").kernel == "decode"
    for options in ({"symmetric": False}, {"weights": "fp8"}, {"group_size": 16}, {"strategy": "channel"}):
        assert CompressedTensorsOptions(**options).with_kernel("cpu", "bfloat16").kernel == "decode"
        with pytest.raises(ConfigError, match="kernel='pack_mm' is for the CPU in bfloat16, symmetric"):
            CompressedTensorsOptions(kernel="pack_mm", **options).with_kernel("cpu", "bfloat16")


ROUNDED = {
    "int8-dynamic": {"weights": "int8", "dynamic_activations": True},
    "int8-static": {"weights": "int8", "static_activations": True},
    "fp8-dynamic": {"weights": "fp8", "dynamic_activations": True},
    "fp8-static": {"weights": "fp8", "strategy": "tensor", "static_activations": True},
    "mxfp8-dynamic": {"weights": "mxfp8", "dynamic_activations": True},
    "mxfp4-dynamic": {"weights": "mxfp4", "dynamic_activations": True},
    "nvfp4-dynamic": {"weights": "nvfp4", "dynamic_activations": True},
}


def nearest(values, name):
    """Each value to the nearest number of a type, all of them at most the largest: by search, ties to the even code."""
    if name == "int8":
        return values.round().clamp(-128, 127)
    if name == "fp8":
        return values.clamp(-448, 448).to(torch.float8_e4m3fn).to(values.dtype)
    numbers = torch.tensor(E2M1[:8], dtype=values.dtype)
    distance = (values.abs().unsqueeze(-1) - numbers).abs()
    least = distance.amin(-1, keepdim=True)
    tied = torch.where(distance == least, torch.tensor([0, 2, 0, 2, 0, 2, 0, 2]), 9)  # odd codes after even ones
    return numbers[torch.where(tied == 0, 0, torch.where(tied == 2, 1, 9)).argmin(-1)] * values.sign()


def rounded(inputs, name, stored):
    """What a kernel multiplies with, from the formats' definitions. inputs: float64 (tokens, columns)."""
    kind, way = name.split("-")
    number = {"mxfp8": "fp8", "mxfp4": "fp4", "nvfp4": "fp4"}.get(kind, kind)
    if way == "static":
        return nearest(inputs / stored, number) * stored
    if kind in ("int8", "fp8"):
        step = inputs.abs().amax(-1, keepdim=True) / {"int8": 127.5, "fp8": 448}[kind]
        return nearest(inputs / step, number) * step
    groups = inputs.unflatten(-1, (-1, FIXED_GROUPS[kind]))
    most = groups.abs().amax(-1, keepdim=True)
    if kind == "nvfp4":
        step = (most / 6 * stored).float().to(torch.float8_e4m3fn).double() / stored
    else:  # a power of two, after the largest was rounded to one bit of mantissa
        mantissa, exponent = torch.frexp(most)
        exponent = exponent - 1 + (mantissa >= 0.875)
        step = torch.ldexp(torch.ones_like(most), exponent - {"mxfp8": 8, "mxfp4": 2}[kind])
    return (nearest(groups / step, number) * step).flatten(-2)


@pytest.mark.parametrize("name", ROUNDED)
def test_activations_are_rounded_as_the_format_says(name):
    options, shape = CompressedTensorsOptions(**ROUNDED[name]), (96, 256)
    tensors = random_tensors(shape, options, torch.float32, options.weight_bits == 8)
    stored = tensors.get("input_global_scale", tensors.get("input_scale"))
    if "input_scale" in tensors:
        stored = tensors["input_scale"] = torch.tensor([0.02])
    layer = packed_linear(linear(shape), options, torch.float32, tensors, plain=options.weight_bits == 8)
    inputs = torch.randn(1, 5, 256, generator=torch.Generator().manual_seed(3))
    expected = rounded(inputs.double(), name, None if stored is None else stored.double())
    found = layer.inputs(inputs).double()
    wrong = (found - expected).abs() > 1e-5
    assert wrong.double().mean() < 0.01  # a tie in float64 is none in float32
    assert not torch.allclose(found, inputs.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(inputs), layer.inputs(inputs) @ layer.dequantize().T, rtol=1e-4, atol=1e-4)
    assert layer.inputs(inputs[:, :0]).shape == (1, 0, 256)
