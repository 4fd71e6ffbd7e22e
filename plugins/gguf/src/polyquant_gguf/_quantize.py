"""Dense matrices to blocks, by the gguf package: the same bytes as llama.cpp's reference quantizers."""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from polyquant.plugin.gguf import BlockType
from torch import Tensor

ROWS_AT_A_TIME = 2048  # bounds the float32 copies


def quantize(weight: Tensor, block: BlockType) -> Tensor:
    """weight: (rows, in_features), finite, whole blocks; returns uint8 (rows, bytes a row)."""
    out = torch.empty(weight.shape[0], block.row_bytes(weight.shape[1]), dtype=torch.uint8)
    kind = GGMLQuantizationType[block.name]
    with np.errstate(all="ignore"):  # blocks of zeros divide by zero on the way
        for start in range(0, weight.shape[0], ROWS_AT_A_TIME):
            rows = weight[start : start + ROWS_AT_A_TIME].float().numpy()
            out[start : start + len(rows)] = torch.from_numpy(quants.quantize(rows, kind))
    return out
