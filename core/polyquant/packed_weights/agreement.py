"""Whether the kernels' steps answer what a decoder itself does. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Protocol

import torch
from torch import Tensor

TRIED, TOLERANCE = 5, 1e-2  # tokens, and the part of the largest output by which the two ways may differ
TEXTS = 3  # texts that are tried: some carry rounding on to a hundred times its size, a wrong step is wrong in all


class Step(Protocol):
    """What makes steps in the place of a decoder."""

    def answer(self, given: Mapping[str, Any]) -> Any:
        """The decoder's output for what its `forward` is given; None where it makes none."""


def agree(inner: Any, step: Step) -> bool:
    """Whether a step answers what the decoder itself does, after the tokens of one of some texts."""
    words = inner.embed_tokens.num_embeddings
    return any(
        _agree_after(inner, step, (torch.arange(TRIED)[None] + words * i // TEXTS) % words) for i in range(TEXTS)
    )


def _agree_after(inner: Any, step: Step, ids: Tensor) -> bool:
    last = {"input_ids": ids[:, -1:], "use_cache": True}
    with torch.inference_mode():
        first = inner(input_ids=ids[:, :-1], use_cache=True)
        prompt = step.answer({"input_ids": ids[:, :-1], "use_cache": True})
        before = first.past_key_values
        other = deepcopy(before) if prompt is None else prompt.past_key_values
        usual = inner(past_key_values=before, **last).last_hidden_state
        answer = step.answer({"past_key_values": other, **last})
    if answer is None:
        return False
    pairs = [(usual, answer.last_hidden_state)]
    if prompt is not None:
        pairs.append((first.last_hidden_state, prompt.last_hidden_state))
    for one, two in zip(before.layers, other.layers, strict=True):
        pairs += [(one.keys, two.keys), (one.values, two.values)]
    return all(
        one.shape == two.shape and bool((one - two).abs().max() <= TOLERANCE * one.abs().max()) for one, two in pairs
    )
