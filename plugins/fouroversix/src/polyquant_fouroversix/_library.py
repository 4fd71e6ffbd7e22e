"""The library's quantizer in torch."""

from __future__ import annotations

from fouroversix.quantize.pytorch import reference
from fouroversix.utils import DataType, ScaleRule
from polyquant.plugin.layers import Rows, in_bands, largest
from torch import Tensor, ones
from torch.nn import functional

from polyquant_fouroversix.formats import BLOCK, ROWS, SWIZZLED, padded, up
from polyquant_fouroversix.options import FouroversixOptions


def quantize(weight: Rows, config: FouroversixOptions) -> dict[str, Tensor]:
    """Codes, scales and the greatest number of a weight (rows, columns), as the library has them of all rows at once,
    with zeros to whole blocks."""
    columns = padded(weight.shape, config.dtype)[1]
    amax = ones(1, device=weight.device) if config.dtype == "mxfp4" else largest(weight)

    def rounded(rows: Tensor) -> dict[str, Tensor]:
        whole = functional.pad(rows, (0, columns - rows.shape[1], 0, up(len(rows), ROWS) - len(rows)))
        codes, scales, _ = reference.quantize_to_fp4(
            whole, amax, block_scale_2d=config.weight_scale_2d, fp4_format=DataType(config.dtype),
            scale_rule=ScaleRule(config.scale_rule), use_blackwell_scale_layout=config.dtype in SWIZZLED,
        )  # fmt: skip
        return {"weight": codes.unflatten(0, (-1, ROWS)), "scales": scales.view(len(whole) // ROWS, -1)}

    # scales are swizzled within so many rows; of each band 25 copies are held
    made = in_bands(weight, rounded, multiple=ROWS, parts=4)
    return {"weight": made["weight"].flatten(0, 1), "scales": made["scales"].flatten(), "amax": amax.reshape(1)}


def codes_as_numbers(x: Tensor, config: FouroversixOptions) -> tuple[Tensor, Tensor, Tensor]:
    """x (rows, features) as numbers of the codes, bfloat16 with zeros to whole blocks; scales row by row; and amax."""
    return reference.quantize_to_fp4(
        functional.pad(x, (0, up(x.shape[1], BLOCK[config.dtype]) - x.shape[1])),
        fp4_format=DataType(config.dtype),
        scale_rule=ScaleRule(config.scale_rule),
        pack_values=False,
        use_blackwell_scale_layout=False,
    )
