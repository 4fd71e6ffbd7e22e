"""Packed codes to weights, through a table of what each byte stands for.

compressed-tensors' own decompression shifts bit by bit: the same values in 5 (fp8) to 13 (int4) times the CPU time.
"""

from __future__ import annotations

from functools import cache

import torch
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from polyquant.plugin import E2M1
from polyquant.plugin.codes import unpacked_bits

from polyquant_compressed_tensors.arguments import BLOCK
from polyquant_compressed_tensors.formats import MX
from polyquant_compressed_tensors.options import CompressedTensorsOptions

ZERO = 8  # the code of int4 that stands for 0
INT_OF_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def decode(
    config: CompressedTensorsOptions, shape: tuple[int, int], dtype: torch.dtype, codes: torch.Tensor,
    scale: torch.Tensor, zero_point: torch.Tensor | None, global_scale: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """The weight in `dtype`, of `shape` (out_features, in_features).

    codes: as `planning.held_tensors` has them. Each weight is (code - zero point) * scale, computed in `dtype`; with
    global_scale the scales are divided by it, in float32.
    """
    if config.weights == "sparse":
        return codes.to(dtype)
    between = torch.float32 if global_scale is not None else dtype
    values = code_values(config.weights, codes, between)[:, : shape[1]]
    scale = group_scales(config.weights, scale, global_scale, dtype)
    if config.strategy == "block":
        rows = scale.repeat_interleave(BLOCK[0], 0)[: shape[0]]
        return values * rows.repeat_interleave(BLOCK[1], 1)[:, : shape[1]]
    if zero_point is not None:
        zero_point = zero_points(zero_point, scale).to(between).unsqueeze(-1)
    groups = (config.group_size or shape[1],)
    values = values.unflatten(1, (-1, *groups))
    values = values if zero_point is None else values - zero_point
    scale = scale if scale.dim() == 2 else of_rows(scale, shape[0])
    return (values * scale.unsqueeze(-1)).flatten(1).to(dtype)


def spread(codes: torch.Tensor, bitmask: torch.Tensor, columns: int) -> torch.Tensor:
    """Codes of all weights, 0 where there is none: (rows, columns) like `codes`, which has half of each row.

    bitmask: a bit for each weight, lowest first, uint8 (rows, columns / 8).
    """
    whole = torch.zeros(len(codes), columns, dtype=INT_OF_BYTES[codes.element_size()], device=codes.device)
    whole[unpacked_bits(bitmask, 1)[:, :columns].bool()] = codes.view(whole.dtype).flatten()
    return whole.view(codes.dtype)


def group_scales(
    weights: str, scale: torch.Tensor, global_scale: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """What the values of codes are multiplied with: MX in `dtype`, of nvfp4 in float32, else as held."""
    if weights in MX:
        return decompress_mx_scale(scale).to(dtype)
    return scale if global_scale is None else scale.float() / of_rows(global_scale, len(scale))


def of_rows(numbers: torch.Tensor, rows: int) -> torch.Tensor:
    """What each row is scaled with, (1, 1) or (rows, 1), of one number for each matrix in turn."""
    return (numbers if len(numbers) == 1 else numbers.repeat_interleave(rows // len(numbers))).unsqueeze(1)


def zero_points(zero_point: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int8, like `scale`: those of int4 are held as words that run down the rows."""
    if zero_point.dtype != torch.int32:
        return zero_point
    return unpack_from_int32(zero_point, 4, scale.shape, packed_dim=0)


def code_values(weights: str, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the codes stand for before scaling, (out_features, at least in_features)."""
    if weights == "int8":
        return codes.to(dtype)
    table = _table(weights, dtype, codes.device)
    looked_up = table.index_select(0, codes.view(torch.uint8).flatten().int())
    return looked_up.view(dtype).view(codes.shape[0], -1)


@cache
def _table(weights: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The one or two values of each of 256 bytes, side by side in one integer; the lower half of a byte comes first."""
    codes = torch.arange(256, dtype=torch.uint8)
    with torch.inference_mode(mode=False):
        if weights.endswith("fp8"):
            values = codes.view(torch.float8_e4m3fn).to(dtype).unsqueeze(1)
        else:
            four_bit = torch.arange(16) - ZERO if weights == "int4" else torch.tensor(E2M1)
            values = torch.stack((four_bit[codes.int() & 15], four_bit[codes.int() >> 4]), 1).to(dtype)
        whole = INT_OF_BYTES[values.element_size() * values.shape[1]]
        return values.contiguous().view(whole).flatten().to(device)
