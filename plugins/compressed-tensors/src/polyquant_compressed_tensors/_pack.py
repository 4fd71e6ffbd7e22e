"""Packed layers in polyquant's layout, and weights of that layout as a checkpoint has them: pack and unpack."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from polyquant.errors import Misfit
from polyquant.plugin import E2M1
from polyquant.plugin.floats import pairs_of_codes
from polyquant.plugin.layers import PackedWeight, WeightCodes, pack_weight
from polyquant.plugin.layouts import packed_group
from polyquant.plugin.packing import e4m3_scales, exponents, fp4_codes, scales_of_rows, unpacked

from polyquant_compressed_tensors._decode import ZERO, group_scales, of_rows, zero_points
from polyquant_compressed_tensors.arguments import BLOCK
from polyquant_compressed_tensors.formats import FP4
from polyquant_compressed_tensors.options import CompressedTensorsOptions
from polyquant_compressed_tensors.planning import columns_of_a_scale

if TYPE_CHECKING:
    from polyquant_compressed_tensors._layers import CompressedLinear


def pack(module: CompressedLinear) -> PackedWeight:
    """Of a layer with any kernel. Raises ModelError for fp8 weights that are NaN."""
    options, columns = module.options, module.in_features
    held = module.checkpoint_tensors(plain=options.weight_bits == 8)
    scales, rows, divides = held["weight_scale"], module.out_features, held.get("weight_global_scale")
    if divides is None:
        scales = group_scales(options.weights, scales, None, module.packed_scale).to(module.packed_scale)
        scales = of_rows(scales, rows) if scales.dim() == 1 else scales
        scales = scales_of_rows(scales, rows, BLOCK[0] if options.strategy == "block" else 1)
    else:
        divides = of_rows(divides.float(), rows).expand(rows, 1)
    codes = held["weight"] if options.weight_bits == 8 else unpacked(held["weight_packed"], 4)[:, :columns]
    zero = ZERO if options.weights == "int4" else 0
    return pack_weight(
        codes, scales, packed_group(columns, columns_of_a_scale(options)), zero=zero,
        zeros=None if options.symmetric else zero_points(held["weight_zero_point"], scales) + zero,
        table=torch.tensor(E2M1) if options.weights in FP4 else None, row_scales=divides, rows_divide=True,
    )  # fmt: skip


def unpack(weight: WeightCodes, config: CompressedTensorsOptions) -> dict[str, torch.Tensor]:
    """As `planning.checkpoint_tensors` names them, in the layout that llm-compressor writes: integers in words."""
    config = config.of_module(weight.name)
    size = columns_of_a_scale(config)
    if config.weights in FP4:
        codes = fp4_codes(weight, size)
        return {"weight_packed": pairs_of_codes(codes), **_fp4_scales(weight.in_groups(size), config)}
    held = weight.in_order().in_groups(size)
    if config.weights == "mxfp8":
        return {"weight": _floats(held), "weight_scale": exponents(held.scales)}
    scale = {"weight_scale": held.scales_as(torch.bfloat16, torch.float16, torch.float32)}
    if config.weights == "fp8":
        return {"weight": _floats(held), **scale}
    bits, middle = int(config.weight_bits), held.middle
    held.integers(bits)
    tensors = {"weight_packed": pack_to_int32((held.codes.short() - middle).to(torch.int8), bits),
               "weight_shape": torch.tensor(weight.shape), **scale}  # fmt: skip
    if config.symmetric:
        held.without_zero_points()
        return tensors
    low = 0 if bits == 4 else -128
    zeros = (held.zero_points(low, low + (1 << bits) - 1) - middle).to(torch.int8)
    return {**tensors, "weight_zero_point": pack_to_int32(zeros, bits, packed_dim=0)}


def _floats(weight: WeightCodes) -> torch.Tensor:
    if weight.kind != "floats":
        raise Misfit("bits", f"its codes are {weight.kind}, and floats of 8 bits (E4M3) are held")
    return weight.codes


def _fp4_scales(weight: WeightCodes, config: CompressedTensorsOptions) -> dict[str, torch.Tensor]:
    if config.weights == "mxfp4":
        return {"weight_scale": exponents(weight.scales)}
    scales, factor = e4m3_scales(weight.scales, divides=True)
    return {"weight_scale": scales, "weight_global_scale": factor}
