"""The formats in polyquant's packed layout: the numbers of `_decode`, in IF4's INT4 blocks to the last bit or two."""

from __future__ import annotations

import torch
from fouroversix.quantize.utils import to_blocked
from polyquant.errors import Misfit
from polyquant.plugin.floats import E2M1, codes_of_pairs, pairs_of_codes
from polyquant.plugin.layers import PackedWeight, WeightCodes, pack_weight
from polyquant.plugin.packing import e4m3_scales, exponents, fp4_codes
from torch import Tensor
from torch.nn import functional

from polyquant_fouroversix._decode import INT_IN_IF4, TWOS_COMPLEMENT, block_factors, block_scales
from polyquant_fouroversix._modules import FouroversixLinear
from polyquant_fouroversix.formats import BLOCK, SWIZZLED, largest, padded
from polyquant_fouroversix.options import FouroversixOptions
from polyquant_fouroversix.planning import LAYOUTS, METADATA, STORED_NAMES

DOUBLED = [int(2 * number) for number in E2M1]


def pack(module: FouroversixLinear) -> PackedWeight:
    config, shape = module.config, (module.out_features, module.in_features)
    layout, block = LAYOUTS[config.dtype], BLOCK[config.dtype]
    codes, whole = codes_of_pairs(module.weight), None
    zero, table, of_rows = 0.0, None, None
    if layout.row_scales != "none":
        factors = block_scales(module.weight, module.scales, config)
        of_rows = (module.amax / largest(config.dtype, config.scale_rule)).view(1, 1).expand(shape[0], 1)
    else:
        factors, whole = block_factors(module.weight, module.scales, module.amax, config)
    if whole is not None:
        codes, factors = _as_integers(codes, factors, whole, block)
    elif config.dtype == "nvint4":
        codes, zero = codes ^ 8, 8.0
    else:
        table = torch.tensor(E2M1)
    groups = layout.padded(shape)[1] // block  # no more than the library's padding has
    scales = factors[: shape[0], :groups].to(getattr(torch, layout.scale_dtype))
    return pack_weight(
        codes[: shape[0], : shape[1]], scales, layout.group_size, table=table, zero=zero, row_scales=of_rows
    )


def unpack(weight: WeightCodes, config: FouroversixOptions) -> dict[str, Tensor]:
    """MXFP4 and NVFP4 under the library's names, padded as the library pads them."""
    if config.dtype not in SWIZZLED:
        raise Misfit("bits", f"{config.dtype} is made of dense weights alone")
    block, (rows, columns) = BLOCK[config.dtype], padded(weight.shape, config.dtype)
    codes = fp4_codes(weight, block)
    whole = functional.pad(codes, (0, columns - codes.shape[1], 0, rows - codes.shape[0]))
    scales, amax = _stored_scales(weight.in_groups(block).scales, config)
    wide = functional.pad(scales, (0, columns // block - scales.shape[1], 0, rows - scales.shape[0]))
    kind = torch.float8_e8m0fnu if config.dtype == "mxfp4" else torch.float8_e4m3fn
    return {
        STORED_NAMES["weight"]: pairs_of_codes(whole),
        STORED_NAMES["scales"]: to_blocked(wide).contiguous().view(kind), STORED_NAMES["amax"]: amax,
        METADATA: metadata(weight.shape, config),
    }  # fmt: skip


def _stored_scales(scales: Tensor, config: FouroversixOptions) -> tuple[Tensor, Tensor]:
    """Scales as bytes, uint8 (rows, blocks), and amax (1,): the numbers of `_decode.block_factors`, bit for bit."""
    if config.dtype == "mxfp4":
        return exponents(scales), torch.ones(1)
    small, factor = e4m3_scales(scales, divides=False)
    most = largest(config.dtype, config.scale_rule)
    amax = factor * most
    for near in (torch.nextafter(amax, amax * 2), torch.nextafter(amax, amax / 2)):
        amax = torch.where(amax / most == factor, amax, near)
    return small.view(torch.uint8), amax


def _as_integers(codes: Tensor, factors: Tensor, whole: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """IF4 has two code books, whose numbers are integers: FP4's when doubled. int8 like codes, and like factors."""
    books = torch.tensor([DOUBLED, TWOS_COMPLEMENT], dtype=torch.int8)
    integers = books[whole.repeat_interleave(block, 1).long(), codes.long()]
    return integers, torch.where(whole, factors * INT_IN_IF4, factors / 2)


def metadata(shape: tuple[int, int], config: FouroversixOptions) -> Tensor:
    """As planning.METADATA says, int32."""
    numbers = [*shape, *padded(shape, config.dtype), 1, int(config.dtype in SWIZZLED)]
    return torch.tensor(numbers, dtype=torch.int32)
