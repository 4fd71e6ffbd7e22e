"""The formats in polyquant's packed layout: the numbers of `_decode`, in IF4's INT4 blocks to the last bit or two."""

from __future__ import annotations

import torch
from polyquant.plugin.floats import E2M1, codes_of_pairs
from polyquant.plugin.layers import PackedWeight, pack_weight
from torch import Tensor

from polyquant_fouroversix._decode import INT_IN_IF4, TWOS_COMPLEMENT, block_factors
from polyquant_fouroversix._modules import FouroversixLinear
from polyquant_fouroversix.formats import BLOCK
from polyquant_fouroversix.planning import LAYOUTS

DOUBLED = [int(2 * number) for number in E2M1]


def pack(module: FouroversixLinear) -> PackedWeight:
    config, shape = module.config, (module.out_features, module.in_features)
    layout, block = LAYOUTS[config.dtype], BLOCK[config.dtype]
    factors, whole = block_factors(module.weight, module.scales, module.amax, config)
    codes = codes_of_pairs(module.weight)
    zero, table = 0.0, None
    if whole is not None:
        codes, factors = _as_integers(codes, factors, whole, block)
    elif config.dtype == "nvint4":
        codes, zero = codes ^ 8, 8.0
    else:
        table = torch.tensor(E2M1)
    groups = layout.padded(shape)[1] // block  # no more than the library's padding has
    scales = factors[: shape[0], :groups].to(getattr(torch, layout.scale_dtype))
    return pack_weight(codes[: shape[0], : shape[1]], scales, layout.group_size, table=table, zero=zero)


def _as_integers(codes: Tensor, factors: Tensor, whole: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """IF4 has two code books, whose numbers are integers: FP4's when doubled. int8 like codes, and like factors."""
    books = torch.tensor([DOUBLED, TWOS_COMPLEMENT], dtype=torch.int8)
    integers = books[whole.repeat_interleave(block, 1).long(), codes.long()]
    return integers, torch.where(whole, factors * INT_IN_IF4, factors / 2)
