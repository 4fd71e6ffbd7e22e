"""Blocks of a model whose packed weights are read from their file when their turn comes. Imports torch.

What is multiplied with is the file's pages, as everywhere; only who asks for them, and who keeps them, is another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from polyquant.models.headers import StoredTensor, located_tensors
from polyquant.packed_weights.experts import ExpertStack
from polyquant.packed_weights.linear import RepackedLinear
from polyquant.packed_weights.tensor_file import MappedFile, Span


def read_by_block(model: Any, file: MappedFile, blocks: Sequence[str]) -> None:
    """Have the packed weights of `blocks`, modules of `model`, read ahead one block, and given back after each.

    Of a mixture only the experts that tokens are routed to are read. Raises ModelError, in a forward pass, where the
    file was changed.
    """
    located = located_tensors(file.path)
    packed = [list(_packed(model.get_submodule(block), block)) for block in blocks]
    ahead = [_spans(located, [name for name, is_expert in each if not is_expert]) for each in packed]
    whole = [_spans(located, [name for name, _ in each]) for each in packed]
    for number, block in enumerate(blocks):
        module = model.get_submodule(block)
        following = ahead[(number + 1) % len(blocks)] if len(blocks) > 1 else []
        module.register_forward_pre_hook(partial(_before, file, following))
        module.register_forward_hook(partial(_after, file, whole[number]))


def _packed(block: Any, prefix: str) -> Iterator[tuple[str, bool]]:
    """Names of the tensors of packed weights in a block, and whether they are of experts."""
    for name, module in block.named_modules(prefix=prefix):
        if isinstance(module, (RepackedLinear, ExpertStack)):
            yield from ((f"{name}.{part}", isinstance(module, ExpertStack)) for part in module._parameters)


def _spans(located: Mapping[str, tuple[StoredTensor, int]], names: Collection[str]) -> list[Span]:
    """Where tensors lie, in as few stretches as there are; a bias that lies elsewhere is too small to matter."""
    places = sorted((start, start + stored.nbytes) for name, (stored, start) in located.items() if name in set(names))
    spans: list[Span] = []
    for start, end in places:
        if spans and spans[-1].start + spans[-1].nbytes == start:
            spans[-1] = Span(spans[-1].start, end - spans[-1].start)
        else:
            spans.append(Span(start, end - start))
    return spans


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it asks the system
def _before(file: MappedFile, following: list[Span], module: Any, inputs: Any) -> None:
    file.require_unchanged()
    file.read_ahead(following)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _after(file: MappedFile, own: list[Span], module: Any, inputs: Any, outputs: Any) -> None:
    file.give_back(own)
