"""Speed as llama-bench defines it, on callables: knows no backend and imports nothing heavy."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from time import perf_counter

from polyquant.types import Record

Feed = Callable[[Sequence[int]], None]
"""Runs tokens through a model after those it was fed before, up to the logits of the last one."""
PROMPT_TOKENS, GENERATED_TOKENS, REPETITIONS = 512, 128, 5
LEAST_GENERATED = 16


class Rate(Record, frozen=True):
    """Tokens a second over several repetitions."""

    mean: float
    standard_deviation: float
    repetitions: tuple[float, ...]


class Speed(Record, frozen=True):
    """Prompt and generation speed of a batch of one, without tokenization and sampling, after a warm-up."""

    prompt_tokens: int  # pp512: of each repetition
    generated_tokens: int  # tg128
    prompt_tokens_per_second: Rate
    generated_tokens_per_second: Rate
    first_token_seconds: float  # for a prompt of `prompt_tokens`


def measure_speed(
    session: Callable[[], Feed],
    vocabulary: int,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    generated_tokens: int = GENERATED_TOKENS,
    repetitions: int = REPETITIONS,
    limit_seconds: float = math.inf,
) -> Speed:
    """Time a model on random tokens, as llama-bench does.

    session: a new, empty context of the model; what it returns has finished its work when it returns.
    limit_seconds: after so long, prompts and generations each, nothing more is repeated; one repetition is always made.
        A model that would need longer than that for one generates fewer tokens, at least LEAST_GENERATED.
    """
    rng = random.Random(0)  # noqa: S311  tokens to time, no secret

    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(count)]

    def prompt() -> float:
        return _seconds(session(), [tokens(prompt_tokens)])

    def generation() -> float:
        return _seconds(session(), [[token] for token in tokens(generated_tokens)])

    prompt()
    prompts = _repeat(prompt, repetitions, limit_seconds)
    a_token = _seconds(session(), [[token] for token in tokens(2)]) / 2
    generated_tokens = _affordable(generated_tokens, a_token, limit_seconds)
    generations = _repeat(generation, repetitions, limit_seconds)
    return Speed(
        prompt_tokens=prompt_tokens,
        generated_tokens=generated_tokens,
        prompt_tokens_per_second=_rate([prompt_tokens / seconds for seconds in prompts]),
        generated_tokens_per_second=_rate([generated_tokens / seconds for seconds in generations]),
        first_token_seconds=statistics.fmean(prompts),
    )


def _repeat(run: Callable[[], float], repetitions: int, limit_seconds: float) -> list[float]:
    seconds: list[float] = []
    while len(seconds) < repetitions and sum(seconds) < limit_seconds:
        seconds.append(run())
    return seconds


def _affordable(tokens: int, seconds_each: float, limit_seconds: float) -> int:
    if tokens * seconds_each <= limit_seconds:
        return tokens
    return min(tokens, max(LEAST_GENERATED, int(limit_seconds / seconds_each)))


def _seconds(feed: Feed, batches: Sequence[Sequence[int]]) -> float:
    started = perf_counter()
    for batch in batches:
        feed(batch)
    return perf_counter() - started


def _rate(rates: list[float]) -> Rate:
    deviation = statistics.stdev(rates) if len(rates) > 1 else 0.0
    return Rate(mean=statistics.fmean(rates), standard_deviation=deviation, repetitions=tuple(rates))
