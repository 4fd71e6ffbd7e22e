"""Rows of integers: from the bytes of EETQ and Gemma, and back. Imports torch.

EETQ stores what its CUTLASS kernels of compute capability 7.5 to 8.9 load: of 64 columns of two neighbouring rows, the
second row's after the first's; within 16 columns in the order COLUMNS; plus 128; and of each four bytes the middle ones
swapped. A file does not say so: that of a GPU of 7.0 is in plain rows, and cannot be told from it.
"""

from __future__ import annotations

import torch
from polyquant.plugin.codes import packed_bits, unpacked_bits
from polyquant.plugin.layers import Rows, in_bands
from torch import Tensor

COLUMNS = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
"""Of 16 stored columns, which of the weight's each is."""
STRIP = 64
"""Columns of a row that lie together."""
HALF = 128


def rows_of_eetq(stored: Tensor) -> Tensor:
    """The integers, int8 (out_features, in_features), of a stored weight, int8 (in_features, out_features)."""
    columns, rows = stored.shape
    codes = _middle_swapped(stored.reshape(-1)) ^ -HALF  # less 128, in 8 bits
    strips = codes.view(rows // 2, columns // STRIP, 2, STRIP).transpose(1, 2).reshape(rows, columns // 16, 16)
    plain = torch.empty_like(strips)
    plain[..., list(COLUMNS)] = strips
    return plain.view(rows, columns)


def eetq_of_rows(codes: Tensor) -> Tensor:
    """The inverse of `rows_of_eetq`."""
    rows, columns = codes.shape
    strips = codes.view(rows, columns // 16, 16)[..., list(COLUMNS)].reshape(rows // 2, 2, columns // STRIP, STRIP)
    return _middle_swapped((strips.transpose(1, 2).reshape(-1)) ^ -HALF).view(columns, rows)


def quantize_eetq(weight: Rows) -> tuple[Tensor, Tensor]:
    """(int8 codes, float16 scales, (rows,)): the largest weight of a row becomes 128, ties go away from zero.

    The rule of EETQ's quantizer, which divides by the scale before that is rounded to float16.
    """

    def rounded(rows: Tensor) -> dict[str, Tensor]:
        scales = rows.float().abs().amax(1) / HALF
        exact = rows.float() / torch.where(scales > 0, scales, 1.0)[:, None]
        codes = torch.where(exact < 0, (exact - 0.5).ceil(), (exact + 0.5).floor())
        return {"codes": codes.clamp_(-HALF, HALF - 1).to(torch.int8), "scales": scales.half()}

    made = in_bands(weight, rounded)
    return made["codes"], made["scales"]


def integers(stored: Tensor, bits: int, columns: int) -> Tensor:
    """Gemma's integers, int8 (rows, columns), of stored rows: of 8 bits as they are, else codes less 2^(bits - 1)."""
    if bits == 8:
        return stored
    return unpacked_bits(stored, bits)[:, :columns].view(torch.int8) - 2 ** (bits - 1)


def stored_integers(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `integers`; what is left of a last byte is 0."""
    if bits == 8:
        return codes
    unsigned = (codes + 2 ** (bits - 1)).view(torch.uint8)
    return packed_bits(torch.nn.functional.pad(unsigned, (0, -codes.shape[1] % (8 // bits))), bits)


def quantize_gemma(weight: Rows, bits: int) -> tuple[Tensor, Tensor]:
    """(stored rows, float32 scales, (rows, 1)): the largest weight of a row becomes 2^(bits - 1) - 1."""
    most = 2 ** (bits - 1) - 1

    def rounded(rows: Tensor) -> dict[str, Tensor]:
        scales = rows.float().abs().amax(1, keepdim=True) / most
        codes = (rows.float() / torch.where(scales > 0, scales, 1.0)).round_().clamp_(-most - 1, most)
        return {"codes": stored_integers(codes.to(torch.int8), bits), "scales": scales}

    made = in_bands(weight, rounded)
    return made["codes"], made["scales"]


def _middle_swapped(flat: Tensor) -> Tensor:
    return flat.view(-1, 4)[:, [0, 2, 1, 3]].reshape(-1)
