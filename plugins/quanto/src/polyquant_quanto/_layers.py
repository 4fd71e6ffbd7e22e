"""How quanto's modules store their weights, and the one change they need."""

from __future__ import annotations

from typing import Any

import torch
from optimum import quanto
from optimum.quanto import QLinear, QTensor, WeightQBitsTensor
from optimum.quanto.tensor.packed import PackedTensor
from polyquant.errors import Misfit
from polyquant.plugin import LayerInfo
from polyquant.plugin.layers import PackedWeight, Quantized, WeightCodes, describe, pack_weight, prepare_for_training

from polyquant_quanto.options import QuantoOptions, group_size

# freezing is all that adapters need; PEFT's prepare_model_for_kbit_training casts every 16-bit parameter to float32,
# which quanto's tensors refuse
__all__ = ["pack", "prepare_for_training", "unpack"]
QTYPES = {"int8": quanto.qint8, "int4": quanto.qint4, "int2": quanto.qint2, "float8": quanto.qfloat8}
NAMES = {"qint8": "int8", "qint4": "int4", "qint2": "int2", "qfloat8_e4m3fn": "float8", "qfloat8": "float8"}


class SafeLinear(QLinear):
    """A QLinear that multiplies with the dequantized weight where optimum-quanto 0.2.7 fails, with the same meaning.

    4 and 2 bit under `torch.inference_mode`, which refuses its view of the packed weight ("Cannot set version_counter
    for inference tensor"); int8 in bfloat16 where torch's CPU kernel would read past the end of a row.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        packed_bits = type(self.weight) is WeightQBitsTensor and torch.is_inference_mode_enabled()
        if not packed_bits and not _overruns(self.weight):
            return super().forward(input)
        output = torch.matmul(input, self.weight.dequantize().t())
        return output if self.bias is None else output + self.bias


def make_safe(model: Any) -> None:
    """Make every quantized layer a SafeLinear."""
    for module in model.modules():
        if type(module) is QLinear:
            module.__class__ = SafeLinear


def _takes_int8pack(weight: Any) -> bool:
    """Whether quanto gives this weight to torch._weight_int8pack_mm: see optimum.quanto.library.qbytes_mm."""
    here = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return here and weight._qtype.name == "qint8" and weight.shape[1] % 4 == 0


def _overruns(weight: Any) -> bool:
    """torch 2.13's kernel crashes on in_features that its vectors do not divide: 16 on AVX512, 8 on AVX2."""
    return isinstance(weight, QTensor) and _takes_int8pack(weight) and weight.shape[1] % 16 != 0


def describe_layers(model: Any) -> list[LayerInfo]:
    skipped = getattr(model.config.quantization_config, "modules_to_not_convert", None) or ()
    return describe(model, _quantized, skipped=skipped)


def pack(module: QLinear) -> PackedWeight:
    """Of 4 bit, the shift is what the library takes away after scaling: a minimum, with its sign turned."""
    weight, shape = module.weight, (module.out_features, module.in_features)
    if NAMES[weight._qtype.name] in ("int8", "float8"):
        return pack_weight(weight._data.detach(), weight._scale.detach().view(shape[0], 1))
    plain = weight if type(weight) is WeightQBitsTensor else weight.weight_qbits_tensor()
    scales, shifts = (tensor.detach().view(shape[0], -1) for tensor in (plain._scale, plain._shift))
    size = group_size(shape[1]) or -1
    return pack_weight(plain._data.unpack().reshape(shape), scales, size, minima=-shifts)


def unpack(weight: WeightCodes, config: QuantoOptions) -> dict[str, torch.Tensor]:
    """8 bit: a scale for each row. 4 bit: shifts are zero points times scales, as exact as float32 is."""
    rows, columns = weight.shape
    ones = {"input_scale": torch.ones(()), "output_scale": torch.ones(())}
    if config.weights in ("int8", "float8"):
        held = weight.in_order().in_groups(-1)
        if config.weights == "int8":
            held.integers(8).without_zero_points()
        elif held.kind != "floats":
            raise Misfit("bits", f"its codes are {held.kind}, and floats of 8 bits (E4M3) are held")
        return {"weight._data": held.codes, "weight._scale": held.scales.reshape(rows, 1), **ones}
    if config.weights != "int4":
        raise Misfit("bits", f"its codes are of {weight.bits} bits, and {config.weights} is asked")
    size = group_size(columns) or columns
    held = weight.integers(4).in_order().in_groups(size)
    scales = held.scales.reshape(-1, 1)
    shifts = -held.minima if held.minima is not None else held.zero_points().float() * held.scales.float()
    return {
        "weight._data._data": PackedTensor.pack(held.codes.reshape(-1, size), bits=4)._data,
        "weight._scale": scales, "weight._shift": shifts.reshape(-1, 1), **ones,
    }  # fmt: skip


def quantize_linear(linear: torch.nn.Linear, config: QuantoOptions) -> QLinear:
    """As transformers does it: a QLinear of the layer, frozen."""
    layer = QLinear.from_module(linear, weights=QTYPES[config.weights])
    layer.freeze()
    make_safe(layer)
    return layer


def kernel(weight: Any) -> str:
    """What multiplies with a quantized weight."""
    if type(weight).__name__.startswith(("TinyGemm", "AWQ", "Marlin")):
        return f"quanto {type(weight).__name__.partition('Weight')[0].partition('F8Q')[0]}"
    fast = _takes_int8pack(weight) and not _overruns(weight)
    return "torch int8pack_mm" if fast else "quanto dequantize and torch matmul"


def _quantized(name: str, module: Any) -> Quantized | None:
    if not isinstance(module, QLinear) or not isinstance(module.weight, QTensor):
        return None
    qtype = module.weight._qtype
    return Quantized((module.out_features, module.in_features), qtype.bits, NAMES[qtype.name], kernel(module.weight))
