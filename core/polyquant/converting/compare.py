"""Reads a converted checkpoint back, with the target's own reader, and holds it against the source. Imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from polyquant.converting.records import ConvertedLayer
from polyquant.converting.source import Source
from polyquant.errors import SaveError
from polyquant.loading.load import load
from polyquant.memory.effective import effective_weight
from polyquant.packable import KEEP, PACKED
from polyquant.packed_weights.experts import RepackedExperts
from polyquant.packed_weights.format import ROWS
from polyquant.packed_weights.frozen import rows_at_a_time
from polyquant.packed_weights.linear import RepackedLinear
from polyquant.plugin import checkpoints
from polyquant.registry.backend import Backend


def compared(
    source: Source, out: Path, target: Backend, how: dict[str, Any], *, progress: bool
) -> list[ConvertedLayer]:
    """Each layer of the checkpoint in `out` beside the source's. how: what `load` is to be given.

    Raises SaveError where something dense is not what it was, or a layer is not quantized any more.
    """
    fields = target.info.options.__struct_fields__
    dense = {name: KEEP for name in ("embeddings", "head", "experts") if name in fields}
    back = load(out, target.name, **how, **dense, kernel=PACKED, device="cpu", compute_dtype="float32")
    _require_same_dense(source, back.model)
    found, every = [], {**source.layers, **source.stacks}
    for name, layer in tqdm(every.items(), desc="Comparing", unit="layer", disable=not progress):
        largest, weight = 0.0, 0.0
        for mine, theirs in _pieces(layer, back.model.get_submodule(name)):
            largest = max(largest, float((mine - theirs).abs().max()))
            weight = max(weight, float(mine.abs().max()))
        found.append(
            ConvertedLayer(
                name=name, shape=layer.shape, scheme=layer.scheme, largest_difference=largest, largest_weight=weight
            )
        )
    return found


def _pieces(one: RepackedLinear | RepackedExperts, other: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The weights of two layers, some rows at a time, or those of experts one by one, float32."""
    if isinstance(one, RepackedExperts):
        yield from zip(one.expert_weights(), other.expert_weights(), strict=True)
        return
    if not isinstance(other, RepackedLinear):
        yield one.packed.decode(), effective_weight(other, one.in_features)
        return
    step = max(ROWS, rows_at_a_time(one.in_features, torch.device("cpu")) // ROWS * ROWS)
    for start in range(0, one.out_features, step):
        yield one.packed.decode(start, start + step), other.packed.decode(start, start + step)


def _require_same_dense(source: Source, theirs: Any) -> None:
    mine, back = source.loaded.model, dict(theirs.named_parameters())
    tied = checkpoints.tied_tensors(mine)
    for name, tensor in mine.named_parameters():
        owner, _, short = name.rpartition(".")
        if name in tied or owner in source.stacks or (owner in source.layers and short != "bias"):
            continue
        if name not in back or not torch.equal(tensor.float(), back[name].float()):
            raise SaveError(f"{name} is not read back as it was written; nothing was written: please report this")
