"""Rounds layers to the grids of HIGGS, which transformers has. Imports torch."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from polyquant.plugin.layers import finite_weight
from torch import Tensor
from transformers.integrations.higgs import get_higgs_grid

from polyquant_codebooks._decode import rotated
from polyquant_codebooks.higgs._decode import words_of_rows
from polyquant_codebooks.higgs._modules import HiggsLinear
from polyquant_codebooks.higgs.options import HiggsOptions

ROWS = 16  # rounded at a time: their distances to all points of a grid lie in memory together


def quantize_linear(name: str, linear: Any, config: HiggsOptions) -> HiggsLinear:
    """A layer that takes the place of `linear`. Raises ModelError where that holds NaN or infinity."""
    tensors = quantize(finite_weight(linear), config, config.tile_of(name))
    if linear.bias is not None:
        tensors["bias"] = linear.bias.detach()
    return HiggsLinear(linear, tensors, config, name)


def quantize(weight: Tensor, config: HiggsOptions, tile: int) -> dict[str, Tensor]:
    """The tensors of a layer, float16. weight: (out_features, in_features).

    Of each block of a row its length is the scale; what is left, rotated, is like normal numbers: grids are for those.
    """
    size = config.hadamard_size
    blocks = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % size)).unflatten(1, (-1, size))
    lengths = blocks.norm(dim=-1)
    normal = rotated(blocks, size) * (sqrt(size) / torch.where(lengths > 0, lengths, 1.0))[..., None]
    grid = get_higgs_grid(config.p, 2 ** (config.p * config.bits)).to(weight.device)
    points = normal.flatten(1).unflatten(1, (-1, config.p))
    nearest = torch.cat([(2 * some @ grid.T - grid.square().sum(-1)).argmax(-1) for some in points.split(ROWS)])
    entries = 2**config.bits
    if config.p == 2:
        codes = torch.stack([nearest // entries, nearest % entries], -1).flatten(1)
        tables, pairs = torch.arange(entries, device=grid.device), grid.view(entries, entries, 2)
    else:
        codes, tables = nearest, grid[:, 0]
        pairs = torch.stack(torch.meshgrid(tables, tables, indexing="ij"), -1)
    scales = (lengths / sqrt(size)).repeat_interleave(size // config.group_size, 1)
    return {
        "weight": words_of_rows(codes, config.bits, tile), "scales": scales.half(), "tables": tables.half(),
        "tables2": pairs.half().contiguous(),
    }  # fmt: skip
