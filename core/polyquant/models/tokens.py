"""Generated tokens, and the text that they come to."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any

import msgspec

LEAST_LOGPROB = -9999.0  # in place of minus infinity, which JSON has no form for


class Token(msgspec.Struct, frozen=True):
    """One generated token."""

    id: int
    logprob: float | None = None  # nats, before temperature and what else shapes sampling; None: not asked for
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens at its place with theirs, the likeliest first


Tokens = Generator[Token, None, None]
"""Tokens as they are made; closing it ends the generation."""


class Decoder:
    """Text of the tokens of one answer as they come, in whole characters, without special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # those of the newest piece, which decide on a space between, and those after it
        self._shown = 0  # how many of them are in the text that was given

    def feed(self, token: int) -> str:
        """What a token adds to the text; empty for a part of a character and for a special token."""
        self._ids.append(token)
        piece = self._rest()
        if not piece or piece.endswith("\ufffd"):
            return ""
        del self._ids[: self._shown]
        self._shown = len(self._ids)
        return piece

    def end(self) -> str:
        """What is left once no more tokens come."""
        piece = self._rest()
        self._shown = len(self._ids)
        return piece

    def _rest(self) -> str:
        before, whole = (
            str(self._tokenizer.decode(ids, skip_special_tokens=True)) for ids in (self._ids[: self._shown], self._ids)
        )
        return whole[len(before) :]


def pieces(tokens: Tokens, decoder: Decoder) -> Generator[str, None, None]:
    """The text of tokens, in pieces as they come."""
    try:
        for token in tokens:
            if piece := decoder.feed(token.id):
                yield piece
    finally:
        tokens.close()
    if rest := decoder.end():
        yield rest


def likeliest(logprobs: Iterable[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Tokens with their log-probabilities, as `Token.top` has them."""
    ordered = sorted(logprobs, key=lambda pair: (-pair[1], pair[0]))
    return tuple((int(token), max(float(value), LEAST_LOGPROB)) for token, value in ordered)
