"""Rounds layers to the grids of HIGGS, which transformers has. Imports torch."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from polyquant.plugin.layers import Rows, in_bands, rows_of
from torch import Tensor
from transformers.integrations.higgs import get_higgs_grid

from polyquant_codebooks._decode import rotated
from polyquant_codebooks.higgs._decode import words_of_rows
from polyquant_codebooks.higgs._modules import HiggsLinear
from polyquant_codebooks.higgs.options import HiggsOptions

DISTANCES = 2**18  # from points to all of a grid, that lie in memory together


def quantize_linear(name: str, linear: Any, config: HiggsOptions) -> HiggsLinear:
    """A layer that takes the place of `linear`. Raises ModelError where that holds NaN or infinity."""
    tensors = quantize(rows_of(linear), config, config.tile_of(name))
    if linear.bias is not None:
        tensors["bias"] = linear.bias.detach()
    return HiggsLinear(linear, tensors, config, name)


def quantize(weight: Rows, config: HiggsOptions, tile: int) -> dict[str, Tensor]:
    """The tensors of a layer, float16. weight: (out_features, in_features).

    Of each block of a row its length is the scale; what is left, rotated, is like normal numbers: grids are for those.
    """
    grid = get_higgs_grid(config.p, 2 ** (config.p * config.bits)).to(weight.device)
    entries = 2**config.bits
    if config.p == 2:
        tables, pairs = torch.arange(entries, device=grid.device), grid.view(entries, entries, 2)
    else:
        tables = grid[:, 0]
        pairs = torch.stack(torch.meshgrid(tables, tables, indexing="ij"), -1)
    made = in_bands(weight, lambda rows: _nearest(rows.float(), grid, config))
    return {
        "weight": words_of_rows(made["codes"], config.bits, tile), "scales": made["scales"], "tables": tables.half(),
        "tables2": pairs.half().contiguous(),
    }  # fmt: skip


def _nearest(weight: Tensor, grid: Tensor, config: HiggsOptions) -> dict[str, Tensor]:
    """Codes, uint8, and scales, float16, of some rows."""
    size = config.hadamard_size
    blocks = torch.nn.functional.pad(weight, (0, -weight.shape[1] % size)).unflatten(1, (-1, size))
    lengths = blocks.norm(dim=-1)
    normal = rotated(blocks, size) * (sqrt(size) / torch.where(lengths > 0, lengths, 1.0))[..., None]
    points, lengths_of_grid = normal.view(-1, config.p), grid.square().sum(-1)
    step, entries = DISTANCES // len(grid), 2**config.bits
    nearest = torch.cat(
        [(2 * some @ grid.T).sub_(lengths_of_grid).argmax(-1).to(torch.uint8) for some in points.split(step)]
    )
    codes = torch.stack([nearest // entries, nearest % entries], -1) if config.p == 2 else nearest
    scales = (lengths / sqrt(size)).repeat_interleave(size // config.group_size, 1)
    return {"codes": codes.view(len(weight), -1), "scales": scales.half()}
