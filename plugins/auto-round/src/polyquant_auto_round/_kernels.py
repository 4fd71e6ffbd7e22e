"""What multiplies: auto-round-lib where it is there and takes the bits, else auto-round's own layers in plain torch.

Neither needs transformers' auto-round path, which changes transformers when it is imported.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from polyquant.errors import EnvironmentProblem, ModelError
from polyquant.plugin import contained
from polyquant.plugin.layers import bias_as_parameter

from polyquant_auto_round.options import AutoRoundOptions, Packing

try:
    with contained():
        import auto_round_kernel
        from auto_round_kernel import qlinear
    INSTALLED = auto_round_kernel.cpu_lib is not None
except ImportError:
    INSTALLED = False

SLOW = "auto-round dequantize and torch matmul"
FAST_BITS = (2, 4, 8)
PRODUCT, SCALE = "auto", "fp32"  # types that auto-round-lib's layers choose on a CPU


def is_fast(bits: int) -> bool:
    """Whether auto-round-lib multiplies weights of so many bits here."""
    return INSTALLED and bits in FAST_BITS


def name(bits: int) -> str:
    """Of what multiplies with weights of so many bits here, and what it does to activations on this CPU."""
    if not is_fast(bits):
        return SLOW
    # with sums of weights beside the scales it is made for products of 8-bit integers
    sizes = {product: _packed_bytes((32, 32), 4, 32, product, sym=True) for product in ("auto", "int8", "fp32")}
    in_int8 = sizes["auto"] == sizes["int8"] != sizes["fp32"]
    return "auto-round-lib woqgemm, activations rounded to int8" if in_int8 else "auto-round-lib woqgemm"


def packed_bytes(shape: tuple[int, ...], config: AutoRoundOptions) -> int:
    """Bytes of a layer as auto-round-lib repacks it for this CPU: float32 scales, and what its products need."""
    return _packed_bytes(shape, config.bits, config.group_size, PRODUCT, sym=config.sym)


def _packed_bytes(shape: tuple[int, ...], bits: int, group_size: int, product: str, *, sym: bool) -> int:
    out_features, in_features = shape
    group = in_features if group_size == -1 else group_size
    return int(
        auto_round_kernel.packed_weight_size(
            torch.empty(0), out_features, in_features, group, product, f"int{bits}", SCALE, not sym
        )
    )


def empty_layer(linear: Any, layout: Packing, config: AutoRoundOptions) -> Any:
    """A packed layer on the meta device that takes the place of `linear`.

    Raises EnvironmentProblem for the AWQ layout without auto-round-lib: auto-round has no other layer for it.
    """
    shape = {"bits": config.bits, "group_size": config.group_size, "bias": linear.bias is not None}
    with torch.device("meta"):
        if is_fast(config.bits):
            kind = {"plain": qlinear.QuantLinear, "gptq": qlinear.QuantLinearGPTQ, "awq": qlinear.QuantLinearAWQ}
            shape |= {"in_features": linear.in_features, "out_features": linear.out_features, "sym": config.sym}
            return kind[layout](**shape)
        if layout == "awq":
            raise EnvironmentProblem(
                "AWQ's layout, which auto-round uses for 4 bits with sym=False too, runs with auto-round-lib only, "
                "which is not installed here; run: pip install auto-round-lib, or load with backend='awq'"
            )
        from polyquant_auto_round import _library

        kind = {"plain": _library.TorchLayer, "gptq": _library.TorchLayerGPTQ}
        layer = kind[layout](**shape, infeatures=linear.in_features, outfeatures=linear.out_features)
    layer.wf = _library.unpacking_shifts(config.bits)
    return layer


def settle(layer: Any) -> None:
    """Bring a layer with its weights into the form that it keeps.

    Raises ModelError where zero points, which a symmetric layer of auto-round-lib does not read, are not the middle.
    """
    if is_fast(layer.bits):
        if not layer.asym:
            require_middle(layer.qzeros, layer.bits)
        layer.post_init()
    if layer.bias is not None and layer.bias.numel():
        bias_as_parameter(layer)
    layer.in_features, layer.out_features = layer.infeatures, layer.outfeatures
    layer.register_parameter("weight", None)
    layer.__class__ = _linear_class(type(layer))
    layer.eval()


@cache
def _linear_class(kind: type) -> type:
    """`kind` as an nn.Linear too: PEFT puts adapters on these, and on classes that it knows."""
    return type(kind.__name__, (kind, torch.nn.Linear), {})


def multiply(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    """inputs, (rows, in_features), times the weight as auto-round-lib's layers do it, without the bias."""
    product = auto_round_kernel.woqgemm(
        inputs.to(layer.torch_dt).contiguous(), layer.qweight, torch.empty(0), layer.outfeatures, layer.infeatures,
        layer.group_size, layer.cdt, layer.wdt, layer.sdt, layer.asym,
    )  # fmt: skip
    return product.to(inputs.dtype)


def require_middle(zeros: torch.Tensor, bits: int) -> None:
    """Raises ModelError unless packed zero points are all the middle of the range, or that less one, as GPTQ's are."""
    ones = sum(1 << shift for shift in range(0, 32, bits))
    words = [ones * (2 ** (bits - 1) - less) for less in (0, 1)]
    if not any(bool((zeros == word - (word >> 31 << 32)).all()) for word in words):
        raise ModelError("its zero points are fitted, and the checkpoint's config says that they are symmetric")
