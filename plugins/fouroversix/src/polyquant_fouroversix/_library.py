"""The library's quantizer in torch, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fouroversix.quantize.pytorch import reference
from fouroversix.utils import DataType, ScaleRule
from torch import Tensor
from torch.nn import functional

from polyquant_fouroversix.formats import BLOCK, ROWS, SWIZZLED, padded, up
from polyquant_fouroversix.options import FouroversixOptions

CHUNK_WEIGHTS = {"cpu": 2**18, "other": 2**26}
"""Weights dequantized at a time: 1 MiB in float32 on the CPU."""
COPIES = 4
"""Rounding holds so many times what dequantizing does."""


def rows_at_once(x: Tensor, columns: int) -> int:
    """Rows of so many numbers that are taken at a time where x lies."""
    return max(1, CHUNK_WEIGHTS["cpu" if x.device.type == "cpu" else "other"] // columns)


def quantize(weight: Tensor, config: FouroversixOptions) -> dict[str, Tensor]:
    """Codes, scales and the greatest number of a weight (rows, columns), as the library has them of all rows at once,
    with zeros to whole blocks."""
    rows, columns = padded((weight.shape[0], weight.shape[1]), config.dtype)
    amax = torch.ones(1, device=weight.device) if config.dtype == "mxfp4" else weight.abs().max().float()
    codes, scales = zip(*_in_bands(weight, rows, columns, amax, config), strict=True)
    return {"weight": torch.cat(codes), "scales": torch.cat(scales), "amax": amax.reshape(1)}


def _in_bands(
    weight: Tensor, rows: int, columns: int, amax: Tensor, config: FouroversixOptions
) -> Iterator[tuple[Tensor, Tensor]]:
    step = up(rows_at_once(weight, COPIES * columns), ROWS)  # scales are swizzled within so many rows
    for start in range(0, rows, step):
        band = weight[start : start + step]
        wanted = min(step, rows - start)
        codes, scales, _ = reference.quantize_to_fp4(
            functional.pad(band, (0, columns - band.shape[1], 0, wanted - band.shape[0])),
            amax,
            block_scale_2d=config.weight_scale_2d,
            fp4_format=DataType(config.dtype),
            scale_rule=ScaleRule(config.scale_rule),
            use_blackwell_scale_layout=config.dtype in SWIZZLED,
        )
        yield codes, scales


def codes_as_numbers(x: Tensor, config: FouroversixOptions) -> tuple[Tensor, Tensor, Tensor]:
    """x (rows, features) as numbers of the codes, bfloat16 with zeros to whole blocks; scales row by row; and amax."""
    return reference.quantize_to_fp4(
        functional.pad(x, (0, up(x.shape[1], BLOCK[config.dtype]) - x.shape[1])),
        fp4_format=DataType(config.dtype),
        scale_rule=ScaleRule(config.scale_rule),
        pack_values=False,
        use_blackwell_scale_layout=False,
    )
