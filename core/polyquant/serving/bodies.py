"""Answers as OpenAI's interface writes them, whole and in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from time import time
from typing import Any
from uuid import uuid4

from polyquant.models.tokens import Token
from polyquant.serving.text import Piece

Shown = Sequence[tuple[int, Token]]  # as in Piece


class Body:
    """One answer of `/v1/completions`."""

    prefix, whole_object, piece_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Any, *, logprobs: bool) -> None:
        self._model, self._tokenizer, self._logprobs = model, tokenizer, logprobs
        self._id, self._created = f"{self.prefix}{uuid4().hex}", int(time())

    def whole(
        self, piece: Piece, finish: str, usage: dict[str, int], calls: Sequence[dict[str, Any]] = ()
    ) -> dict[str, Any]:
        """The answer in one."""
        choice = self.choice(piece, calls) | self._with_logprobs(piece.tokens) | {"finish_reason": finish}
        return self._around(self.whole_object, [choice]) | {"usage": usage}

    def first(self) -> dict[str, Any] | None:
        """What comes before the first piece."""
        return None

    def piece(self, piece: Piece, calls: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """A piece of a stream."""
        choice = self.delta(piece, calls) | self._with_logprobs(piece.tokens) | {"finish_reason": None}
        return self._around(self.piece_object, [choice])

    def last(self, finish: str) -> dict[str, Any]:
        """What comes after the last piece."""
        choice = self.delta(Piece("", ()), ()) | {"finish_reason": finish}
        return self._around(self.piece_object, [choice])

    def used(self, usage: dict[str, int]) -> dict[str, Any]:
        """What a stream ends with where the client wants to know what was used."""
        return self._around(self.piece_object, []) | {"usage": usage}

    def choice(self, piece: Piece, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"text": piece.text}

    def delta(self, piece: Piece, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"text": piece.text}

    def logprobs(self, tokens: Shown) -> dict[str, Any]:
        return {
            "tokens": [self._word(token.id) for _, token in tokens],
            "token_logprobs": [token.logprob for _, token in tokens],
            "top_logprobs": [{self._word(each): value for each, value in token.top} for _, token in tokens],
            "text_offset": [at for at, _ in tokens],
        }

    def _with_logprobs(self, tokens: Shown) -> dict[str, Any]:
        return {"logprobs": self.logprobs(tokens) if self._logprobs else None}

    def _around(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        numbered = [{"index": index, **choice} for index, choice in enumerate(choices)]
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": numbered}

    def _word(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))


class ChatBody(Body):
    """One answer of `/v1/chat/completions`."""

    prefix, whole_object, piece_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def first(self) -> dict[str, Any] | None:
        choice = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return self._around(self.piece_object, [choice])

    def choice(self, piece: Piece, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
        said = {"role": "assistant", "content": piece.text or (None if calls else ""), "refusal": None}
        return {"message": said | ({"tool_calls": list(calls)} if calls else {})}

    def delta(self, piece: Piece, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
        numbered = [{"index": index, **call} for index, call in enumerate(calls)]
        said = {"content": piece.text} if piece.text else {}
        return {"delta": said | ({"tool_calls": numbered} if calls else {})}

    def logprobs(self, tokens: Shown) -> dict[str, Any]:
        return {"content": [self._entry(token) for _, token in tokens], "refusal": None}

    def _entry(self, token: Token) -> dict[str, Any]:
        top = [self._one(each, value) for each, value in token.top]
        return self._one(token.id, token.logprob) | {"top_logprobs": top}

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        word = self._word(token)
        whole = "\ufffd" not in word  # else it is a part of a character, whose bytes nobody can tell from it
        return {"token": word, "logprob": logprob, "bytes": list(word.encode()) if whole else None}
