"""From a request to the pieces of its answer."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from threading import Lock
from time import monotonic
from typing import Any

from polyquant.errors import ConfigError
from polyquant.loaded import LoadedModel
from polyquant.models.prompts import encode_prompt
from polyquant.models.tokens import Token
from polyquant.serving.line import Job, Line
from polyquant.serving.metrics import Metrics
from polyquant.serving.refusals import Refused
from polyquant.serving.requests import ChatRequest, CompletionRequest, Request, messages_of
from polyquant.serving.text import Piece, Text
from polyquant.serving.toolcalls import require_tools

UNLIMITED_TOKENS = 2048  # of an answer, where neither client nor model nor server has a limit


class Served:
    """A loaded model as requests see it."""

    def __init__(self, loaded: LoadedModel, name: str, max_tokens: int, waiting: int) -> None:
        """max_tokens: of prompt and answer; 0: as the model can. waiting: requests that may wait."""
        self.loaded, self.name = loaded, name
        known = [count for count in (max_tokens, loaded.context) if count]
        self.limit = min(known, default=None)
        self.line = Line(loaded, waiting)
        self.metrics = Metrics(self.line)
        self._tokenizing = Lock()  # tokenizers are not made for two threads

    async def begin(self, asked: Request) -> Answer:
        """An answer that has a place in the line. Raises Refused, or ConfigError for a prompt that cannot be run."""
        if asked.model != self.name:
            raise Refused(
                404, f"there is no model {asked.model!r} here: it is {self.name!r}", code="model_not_found",
                parameter="model",
            )  # fmt: skip
        ids = await asyncio.to_thread(self._ids, asked)
        most = self._room(len(ids), asked.most)
        seed = secrets.randbelow(2**63) if asked.seed is None else asked.seed
        parameters = {"max_new_tokens": most, **asked.sampling()}
        if asked.schema is not None:
            parameters["schema"] = asked.schema
        job = Job(ids, parameters, seed, asked.top)
        return Answer(self, asked, job, most)

    def _ids(self, asked: Request) -> list[int]:
        tokenizer = self.loaded.tokenizer
        with self._tokenizing:
            if isinstance(asked, ChatRequest):
                if not getattr(tokenizer, "chat_template", None):
                    raise Refused(
                        400, f"{self.name} has no chat template, so it takes no messages: send text to /v1/completions",
                        code="no_chat_template",
                    )  # fmt: skip
                if asked.offered:
                    require_tools(tokenizer)
                tools = {"tools": list(asked.offered)} if asked.offered else {}
                return encode_prompt(tokenizer, messages_of(asked), {**(asked.chat_template_kwargs or {}), **tools})
            assert isinstance(asked, CompletionRequest)  # there are two kinds
            return _plain_ids(tokenizer, asked.prompt, self.loaded)

    def _room(self, prompt: int, most: int | None) -> int:
        """New tokens at most."""
        if self.limit is None:
            return most or UNLIMITED_TOKENS
        if prompt + (most or 1) > self.limit:
            new = f" and max_tokens is {most}" if most else ""
            raise Refused(
                400, f"the prompt has {prompt} tokens{new}, and prompt and answer have {self.limit} together at most: "
                "send or ask for less",
                code="context_length_exceeded",
            )  # fmt: skip
        return most or self.limit - prompt


def _plain_ids(tokenizer: Any, prompt: str | Sequence[int | str], loaded: LoadedModel) -> list[int]:
    if isinstance(prompt, str):
        return encode_prompt(tokenizer, prompt)
    if len(prompt) == 1 and isinstance(prompt[0], str):
        return encode_prompt(tokenizer, prompt[0])
    ids = [token for token in prompt if isinstance(token, int)]
    if len(ids) < len(prompt) or not ids:
        raise Refused(
            400, "one prompt a request: a text, a list with one text, or a list of token ids", parameter="prompt"
        )
    vocabulary = loaded.vocabulary
    if not 0 <= min(ids) <= max(ids) < vocabulary:
        raise ConfigError(f"token ids go from 0 to {vocabulary - 1}, got {min(ids)} to {max(ids)}")
    return ids


class Answer:
    """One answer while it is made."""

    def __init__(self, served: Served, asked: Request, job: Job, most: int) -> None:
        self._served, self._asked, self._job, self._most = served, asked, job, most
        self._text = Text(served.loaded.decoder(), asked.stops)
        self._began = monotonic()
        self._over = False
        self.prompt, self.ids = job.ids, list[int]()
        served.line.enter(job)

    async def pieces(self) -> AsyncIterator[Piece]:
        """As they come. Raises what the generation raised."""
        try:
            async for token in self._job.tokens():
                piece = self._taken(token)
                if piece.text or piece.tokens:
                    yield piece
                if self._text.stopped:
                    break
            rest = self._text.end()
            if rest.text or rest.tokens:
                yield rest
            self._served.metrics.whole.observe(monotonic() - self._began)
        except Exception:
            self._over = True  # it failed: nobody left
            raise
        self._over = True

    def _taken(self, token: Token) -> Piece:
        metrics = self._served.metrics
        if not self.ids:
            metrics.prompt_tokens.inc(len(self.prompt))
            metrics.first_token.observe(monotonic() - self._began)
        metrics.generated_tokens.inc()
        self.ids.append(token.id)
        return self._text.feed(token)

    def leave(self) -> None:
        """End the generation, where it still goes on: nobody waits for it."""
        self._served.line.leave(self._job)
        if not self._over:
            self._over = True
            self._served.metrics.abandoned.inc()

    @property
    def finish(self) -> str:
        """Why it ended: length, or stop."""
        ended = self.ids and self.ids[-1] == getattr(self._served.loaded.tokenizer, "eos_token_id", None)
        return "length" if len(self.ids) >= self._most and not (self._text.stopped or ended) else "stop"

    @property
    def usage(self) -> dict[str, int]:
        """Tokens, as OpenAI's interface counts them."""
        prompt, made = len(self.prompt), len(self.ids)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
