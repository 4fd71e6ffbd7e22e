"""Weights to codes and scales, each format by the rule of those whose checkpoints hold it."""

from __future__ import annotations

import torch
from polyquant.plugin.floats import MOST_E2M1, MOST_E4M3, e2m1_codes, e8m0_bytes, pairs_of_codes
from polyquant.plugin.layers import Rows, in_bands, largest
from torch import Tensor
from torch.nn import functional

from polyquant_mx._decode import E4M3, rotated
from polyquant_mx.formats import Scheme

LEAST_E4M3 = 2.0**-9
MOST_INT4 = 7
OUTER_MXFP4, OUTER_NVFP4 = 3.0, 10.0
"""FP-Quant's: what weights are multiplied with before they are rounded, so that more of the range is used."""


def quantized(weight: Rows, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of `Scheme.parts`. weight: (out_features, in_features), finite."""
    of_all = _of_all(weight, scheme)

    def rounded(rows: Tensor) -> dict[str, Tensor]:
        numbers = rows.float()
        if scheme.rotation:
            return _rotated(numbers, scheme, of_all["rotation"])
        if scheme.codes == "e2m1":
            in_mx = scheme.scales == "e8m0"
            return _mxfp4(numbers, scheme.columns) if in_mx else _nvfp4(numbers, scheme.columns, of_all["outer_scale"])
        if scheme.codes == "int4":
            return _int4(numbers, scheme.columns)
        return _mxfp8(numbers, scheme.columns) if scheme.scales == "e8m0" else _fp8(numbers, scheme, of_all)

    return {**in_bands(weight, rounded, multiple=2 if scheme.codes == "int4" else scheme.rows or 1), **of_all}


def _of_all(weight: Rows, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors that all rows have together."""
    in_mx = scheme.scales == "e8m0"
    if scheme.rotation:
        outer = torch.tensor([OUTER_MXFP4 if in_mx else OUTER_NVFP4])
        return {"outer_scale": outer, "rotation": hadamard(scheme.rotation)}
    if scheme.codes == "e2m1" and not in_mx:
        return {"outer_scale": _or_one(largest(weight) / (MOST_E2M1 * MOST_E4M3)).view(1)}
    if scheme.codes == "e4m3" and not in_mx and not scheme.rows:
        return {"scales": _or_one(largest(weight) / MOST_E4M3).view(1, 1)}
    return {}


def hadamard(size: int) -> Tensor:
    """Sylvester's, orthonormal: float32 (size, size), of a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * size**-0.5


def _blocks(numbers: Tensor, columns: int) -> Tensor:
    """(rows, groups, columns), the last group filled with zeros."""
    return functional.pad(numbers, (0, -numbers.shape[1] % columns)).unflatten(1, (-1, columns))


def _mxfp4(numbers: Tensor, columns: int) -> dict[str, Tensor]:
    """OCP's rule: the exponent is that of the block's largest number less E2M1's own, 2; what is above 6 is 6."""
    blocks = _blocks(numbers, columns)
    exponents = _floor_log2(blocks.abs().amax(-1)) - 2
    return _in_e2m1(blocks, exponents)


def _in_e2m1(blocks: Tensor, exponents: Tensor) -> dict[str, Tensor]:
    """Blocks (rows, groups, columns) whose scales are powers of two."""
    exponents = exponents.clamp(-127, 127)
    scaled = torch.ldexp(blocks, -exponents[..., None])
    return {"qweight": pairs_of_codes(e2m1_codes(scaled).flatten(1)), "scales": e8m0_bytes(exponents)}


def _mxfp8(numbers: Tensor, columns: int) -> dict[str, Tensor]:
    """ModelOpt's and transformers' rule: the least power of two by which the block's largest number is at most 448."""
    blocks = _blocks(numbers, columns)
    wanted = blocks.abs().amax(-1) / MOST_E4M3
    exponents = torch.where(wanted > 0, wanted.log2(), -127.0).ceil().clamp(-127, 127)
    scaled = (blocks * torch.exp2(-exponents)[..., None]).clamp(-MOST_E4M3, MOST_E4M3).to(E4M3).flatten(1)
    return {"qweight": scaled[:, : numbers.shape[1]].contiguous(), "scales": e8m0_bytes(exponents)}


def _nvfp4(numbers: Tensor, columns: int, outer: Tensor) -> dict[str, Tensor]:
    """ModelOpt's rule: the largest number of the matrix is 6 * 448, and that of each block 6."""
    blocks = _blocks(numbers, columns)
    scales = _or_one(blocks.abs().amax(-1) / (MOST_E2M1 * outer)).clamp(LEAST_E4M3, MOST_E4M3).to(E4M3)
    codes = e2m1_codes(blocks / (scales.float() * outer)[..., None])
    return {"qweight": pairs_of_codes(codes.flatten(1)), "scales": scales}


def _fp8(numbers: Tensor, scheme: Scheme, of_all: dict[str, Tensor]) -> dict[str, Tensor]:
    """The largest number of the matrix, of each row, or of each block is 448."""
    if of_all:
        return {"qweight": (numbers / of_all["scales"]).to(E4M3)}
    (rows, columns), height, width = numbers.shape, scheme.rows, scheme.columns or numbers.shape[1]
    whole = functional.pad(numbers, (0, -columns % width, 0, -rows % height))
    blocks = whole.unflatten(1, (-1, width)).unflatten(0, (-1, height))  # (blocks, height, groups, width)
    scales = _or_one(blocks.abs().amax((1, 3)) / MOST_E4M3)
    codes = (blocks / scales[:, None, :, None]).to(E4M3).flatten(2).flatten(0, 1)
    return {"qweight": codes[:rows, :columns].contiguous(), "scales": scales}


def _int4(numbers: Tensor, columns: int) -> dict[str, Tensor]:
    """The largest number of each group is 7."""
    blocks = _blocks(numbers, columns)
    scales = _or_one(blocks.abs().amax(-1) / MOST_INT4)
    codes = (blocks / scales[..., None]).round().clamp(-8, 7).to(torch.int8).flatten(1)[:, : numbers.shape[1]]
    first, second = (codes.view(torch.uint8) & 15).unflatten(0, (-1, 2)).unbind(1)
    return {"qweight": first | (second << 4), "scales": scales}


def _rotated(numbers: Tensor, scheme: Scheme, rotation: Tensor) -> dict[str, Tensor]:
    """FP-Quant's rule 'abs_max': scales of MXFP4 are floor(log2) of the largest number, and codes 3 times theirs."""
    blocks = _blocks(rotated(numbers, rotation), scheme.columns)
    edges = blocks.abs().amax(-1)
    if scheme.scales == "e8m0":
        return _in_e2m1(blocks * OUTER_MXFP4, _floor_log2(edges))
    scales = (edges * OUTER_NVFP4 / MOST_E2M1).clamp(LEAST_E4M3, MOST_E4M3).to(E4M3)
    codes = e2m1_codes(blocks * OUTER_NVFP4 / scales.float()[..., None])
    return {"qweight": pairs_of_codes(codes.flatten(1)), "scales": scales}


def _floor_log2(numbers: Tensor) -> Tensor:
    """Whole numbers; of zero the least exponent."""
    exponents = torch.frexp(numbers).exponent - 1
    return torch.where(numbers > 0, exponents, -127)


def _or_one(scales: Tensor) -> Tensor:
    """1 where a scale is zero."""
    return torch.where(scales > 0, scales, torch.ones_like(scales))
