"""Dense matrices to blocks, by the gguf package: the same bytes as llama.cpp's reference quantizers."""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from polyquant.plugin.gguf import BlockType
from polyquant.plugin.layers import Rows, in_bands
from torch import Tensor


def quantize(weight: Rows, block: BlockType) -> Tensor:
    """weight: (rows, in_features), finite, whole blocks; returns uint8 (rows, bytes a row)."""
    kind = GGMLQuantizationType[block.name]

    def blocks(rows: Tensor) -> dict[str, Tensor]:
        return {"blocks": torch.from_numpy(quants.quantize(rows.float().numpy(), kind))}

    with np.errstate(all="ignore"):  # blocks of zeros divide by zero on the way
        return in_bands(weight, blocks)["blocks"]
