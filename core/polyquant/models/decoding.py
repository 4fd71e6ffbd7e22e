"""Transformers' greedy decoding and sampling of one text, where what stands around a token costs more than the token.

That is so where the kernels make whole steps: of 4-bit SmolLM2-135M on two cores, transformers' own loop and a thread
that streams are half of a token's time. What transformers prepares (processors of logits, criteria to stop, the cache)
is taken as it is, and what is not the plain case goes its usual way. Imports torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from threading import Event
from typing import Any, Protocol

import torch
from torch import Tensor

from polyquant.models import versions
from polyquant.models.structured import Fitting
from polyquant.models.tokens import LEAST_LOGPROB, Token, likeliest

TAKEN = ("past_key_values", "use_cache", "logits_to_keep", "position_ids", "attention_mask", "tokenizer")
"""What transformers hands to a loop for a plain text."""
NOT_HANDED = ("assistant_model", "assistant_tokenizer", "stop_strings", "synced_gpus", "custom_generate")
"""What `generate` keeps from a loop that is not its own, or, of stop_strings, the tokenizer that they need."""


class Steps(Protocol):
    """The `forward` of a decoder whose steps are made as a whole: `polyquant.packed_weights.step.Forward`."""

    def show_late(self, cache: Any) -> None: ...
    def show(self, cache: Any) -> None: ...


def steps_of(model: Any) -> Steps | None:
    """What makes the whole steps of a model's decoder; None where each layer is called by its own module."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    forward = getattr(decoder, "forward", None)
    return forward if hasattr(forward, "show_late") else None


def new_tokens(model: Any, given: Mapping[str, Any]) -> Iterator[Tensor] | None:
    """The tokens that `model.generate(**given)` would add to one text, each (1,), as they are made; None: not the plain
    case.

    Raises what `generate` raises for parameters that do not go together.
    """
    if steps_of(model) is None or not versions.takes_loops(model):
        return None
    if any(given.get(name) for name in NOT_HANDED) or model.generation_config.stop_strings:
        return None
    try:
        tokens: Iterator[Tensor] = model.generate(custom_generate=_loop, **given)
    except _NotPlain:
        return None
    return tokens


class Seen:
    """A processor of logits that changes none, and keeps what each token is chosen from."""

    def __init__(self, top: int) -> None:
        """top: how many of the likeliest tokens to give beside the one that is chosen."""
        self._top, self._kept = top, deque[Tensor]()

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self._kept.append(torch.log_softmax(scores[0].float(), dim=-1))
        return scores

    def token(self, token: int) -> Token:
        """The oldest token that was not given yet; a loop may be a step ahead of what it hands out."""
        logprobs = self._kept.popleft()
        values, ids = logprobs.topk(min(self._top, len(logprobs)))
        top = likeliest(zip(ids.tolist(), values.tolist(), strict=True))
        return Token(token, max(float(logprobs[token]), LEAST_LOGPROB), top)


class Structured:
    """A processor of logits that leaves those tokens alone with which an answer can be as it has to."""

    def __init__(self, fitting: Fitting, prompt: int) -> None:
        """prompt: tokens before the answer."""
        self._fitting, self._taken = fitting, prompt

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        for token in ids[0, self._taken :].tolist():
            self._fitting.take(token)
        self._taken = ids.shape[1]
        eight = torch.frombuffer(bytearray(self._fitting.allowed()), dtype=torch.uint8)
        allowed = (eight[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten().bool()
        known = min(len(allowed), scores.shape[1])  # an embedding may have more rows than there are tokens
        forbidden = torch.ones(scores.shape[1], dtype=torch.bool)
        forbidden[:known] = ~allowed[:known]
        return scores.masked_fill(forbidden.to(scores.device), -float("inf"))


class _Ended(BaseException):
    """Nobody wants more tokens: leaves transformers' loop, which has no other way out."""


def streamer(take: Callable[[int], None], stopped: Event) -> Any:
    """For `generate`: hands each new token to `take`, until `stopped`."""
    from transformers.generation.streamers import BaseStreamer

    class Streamer(BaseStreamer):  # type: ignore[misc]  # transformers is not typed here
        at_prompt = True

        def put(self, value: Tensor) -> None:
            if self.at_prompt:
                self.at_prompt = False
                return
            if stopped.is_set():
                raise _Ended
            for token in value.flatten().tolist():
                take(token)

        def end(self) -> None: ...

    return Streamer()


class _NotPlain(Exception):
    """What is asked for is left to transformers."""


def _loop(
    model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **given: Any
) -> Iterator[Tensor]:
    """For `generate`'s custom_generate: judges at once, and makes tokens when they are asked for."""
    asked, steps = generation_config, steps_of(model)
    cache: Any = given.get("past_key_values")
    is_plain = (
        len(input_ids) == 1
        and asked.get_generation_mode() in ("greedy_search", "sample")
        and type(cache).__name__ == "DynamicCache"
        and cache.get_seq_length() == 0
        and given.get("use_cache")
        and given.get("attention_mask") is None
        and all(value is None or name in TAKEN for name, value in given.items())
        and not any((asked.return_dict_in_generate, asked.prefill_chunk_size, asked.token_healing, asked.stop_strings))
    )
    if steps is None or not is_plain:
        raise _NotPlain
    more = {name: given[name] for name in ("logits_to_keep",) if name in given}
    tokens: Iterator[Tensor] = _tokens(
        model, steps, input_ids, cache, logits_processor, stopping_criteria, bool(asked.do_sample), more
    )
    return tokens


@torch.no_grad()  # type: ignore[untyped-decorator]
def _tokens(
    model: Any, steps: Steps, ids: Tensor, cache: Any, processors: Any, criteria: Any, samples: bool,
    more: Mapping[str, Any],
) -> Iterator[Tensor]:  # fmt: skip
    feed = ids
    steps.show_late(cache)
    try:
        while True:
            outputs = model(input_ids=feed, past_key_values=cache, use_cache=True, return_dict=True, **more)
            scores = processors(ids, outputs.logits[:, -1].to(copy=True, dtype=torch.float32))
            if samples:
                token = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
            else:
                token = scores.argmax(dim=-1)
            feed = token[:, None]
            ids = torch.cat([ids, feed], dim=-1)
            yield token
            if bool(criteria(ids, None).all()):
                return
    finally:
        steps.show(cache)
