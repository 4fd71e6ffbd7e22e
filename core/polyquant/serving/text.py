"""The text of an answer as it comes, up to the first of the texts that stop it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from polyquant.models.tokens import Decoder, Token


class Piece(NamedTuple):
    """A piece of text, and the tokens that begin in it."""

    text: str
    tokens: tuple[tuple[int, Token], ...]  # where each begins in the text of the whole answer, in characters


class Text:
    """Of one answer. Nothing that may become a stop text is given before it is known not to be one."""

    def __init__(self, decoder: Decoder, stops: Sequence[str]) -> None:
        self._decoder, self._stops = decoder, tuple(stops)
        self._held, self._given = "", 0
        self._tokens = deque[tuple[int, Token]]()
        self.stopped = False  # whether a stop text has come

    def feed(self, token: Token) -> Piece:
        """What there is to give after one more token."""
        self._tokens.append((self._given + len(self._held), token))
        return self._add(self._decoder.feed(token.id))

    def end(self) -> Piece:
        """What is left once no more tokens come."""
        piece = self._add(self._decoder.end())
        if self.stopped:
            return piece
        rest = self._give(len(self._held))
        left = (*piece.tokens, *rest.tokens, *self._tokens)
        self._tokens.clear()
        return Piece(piece.text + rest.text, left)

    def _add(self, text: str) -> Piece:
        if self.stopped:
            return Piece("", ())
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            piece = self._give(min(found))
            self.stopped, self._held = True, ""
            self._tokens.clear()
            return piece
        return self._give(len(self._held) - self._beginning())

    def _beginning(self) -> int:
        """Characters at the end of what is held with which a stop text begins."""
        longest = min(len(self._held), max(map(len, self._stops), default=1) - 1)
        for count in range(longest, 0, -1):
            if any(stop.startswith(self._held[-count:]) for stop in self._stops):
                return count
        return 0

    def _give(self, count: int) -> Piece:
        text, self._held = self._held[:count], self._held[count:]
        self._given += count
        tokens = []
        while self._tokens and self._tokens[0][0] < self._given:
            tokens.append(self._tokens.popleft())
        return Piece(text, tuple(tokens))
