"""Packed layers against compressed-tensors' own decompression, and against float64; every layout that is read."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from polyquant.errors import ConfigError
from polyquant_compressed_tensors._kernels import Int4PackLinear
from polyquant_compressed_tensors._layers import packed_linear
from polyquant_compressed_tensors._library import quantization_scheme
from polyquant_compressed_tensors.options import CompressedTensorsOptions
from polyquant_compressed_tensors.planning import SCALE, checkpoint_tensors, held_tensors, quantized_bytes
from polyquant.types import WeightInfo

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
    return {"int8": (True, False), "fp8": (True,)}.get(options.weights, (False,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_the_weight_is_what_compressed_tensors_decompresses(name, shape, dtype):
    options = CompressedTensorsOptions(**LAYOUTS[name])
    for plain in formats(options):
        tensors = random_tensors(shape, options, dtype, plain)
        layer = packed_linear(linear(shape), options, dtype, tensors, plain=plain)
        library = BaseCompressor.get_value_from_registry("naive-quantized" if plain else options.packed_format)
        expected = library.decompress(tensors, quantization_scheme(options))["weight"]
        if name == "nvfp4" and dtype == torch.float16:  # the library goes through bfloat16
            torch.testing.assert_close(layer.dequantize().bfloat16(), expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(layer.dequantize().to(expected.dtype), expected)
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


def test_rounded_activations_are_those_of_compressed_tensors():
    """Each token to 127 steps of its largest value, before the product."""
    options, shape = CompressedTensorsOptions(weights="int8", dynamic_activations=True), (96, 256)
    tensors = random_tensors(shape, options, torch.float32, True)
    layer = packed_linear(linear(shape), options, torch.float32, tensors, plain=True)
    inputs = torch.randn(1, 5, 256, generator=torch.Generator().manual_seed(3))
    step = inputs.abs().amax(-1, keepdim=True) / 127.5
    rounded = (inputs / step).round().clamp(-128, 127) * step
    torch.testing.assert_close(layer(inputs), rounded @ layer.dequantize().T, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(layer(inputs), inputs @ layer.dequantize().T, rtol=1e-4, atol=1e-4)
