"""The HTTP interface: OpenAI's paths, `/health` and `/metrics`. Imports starlette."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from polyquant.serving.bodies import Body, ChatBody
from polyquant.serving.generating import Answer, Served
from polyquant.serving.options import ServeOptions
from polyquant.serving.refusals import Refused, refused
from polyquant.serving.requests import ChatRequest, CompletionRequest, Request, read
from polyquant.serving.text import Piece
from polyquant.serving.toolcalls import read_calls

BODY_SECONDS = 60.0  # in which a client has to send its request
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")
OPEN = ("/health",)  # without a key
GONE = 499  # a status for the count alone: the client reads none any more
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
LOG = logging.getLogger("polyquant.serving")
Result = TypeVar("Result")


def application(served: Served, options: ServeOptions) -> Any:
    """The ASGI application."""
    kinds: dict[str, tuple[type[Request], type[Body]]] = {
        "/v1/chat/completions": (ChatRequest, ChatBody), "/v1/completions": (CompletionRequest, Body),
    }  # fmt: skip

    async def complete(http: HttpRequest) -> Response:
        try:
            return await _complete(http, *kinds[http.url.path], served, options.max_request_bytes)
        except ClientDisconnect:
            return Response(status_code=GONE)
        except Exception as error:
            return _refusal(_told(error))

    async def models(http: HttpRequest) -> Response:
        model = {"id": served.name, "object": "model", "created": 0, "owned_by": "polyquant"}
        return _json({"object": "list", "data": [model]})

    async def health(http: HttpRequest) -> Response:
        return _json({"status": "ok"})

    async def metrics(http: HttpRequest) -> Response:
        return Response(served.metrics.text(), media_type="text/plain; version=0.0.4")

    routes = [
        *(Route(path, complete, methods=["POST"]) for path in kinds),
        Route("/v1/models", models), Route("/health", health), Route("/metrics", metrics),
    ]  # fmt: skip
    handlers: dict[Any, Any] = {HTTPException: _unrouted}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), served, options)


async def _complete(
    http: HttpRequest, kind: type[Request], body_of: type[Body], served: Served, most_bytes: int
) -> Response:
    asked = read(kind, await _body(http, most_bytes))
    answer = await served.begin(asked)
    body = body_of(served.name, served.loaded.tokenizer, logprobs=asked.top is not None)
    try:
        if not asked.stream:
            return _json(await _while_there(http, _whole(served, asked, answer, body)))
        events = _events(served, asked, answer, body)
        return Events(await _while_there(http, anext(events)), events, answer)
    except BaseException:
        answer.leave()
        raise


class Guard:
    """Lets those in who may come in, and counts."""

    def __init__(self, application: Any, served: Served, options: ServeOptions) -> None:
        self._application, self._served, self._options = application, served, options

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in PATHS else "other"
                self._served.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        try:
            self._check(scope)
        except Refused as error:
            await _refusal(error)(scope, receive, counted)
            return
        await self._application(scope, receive, counted)

    def _check(self, scope: Any) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self._options.is_loopback and name.lower() not in (*LOOPBACK_NAMES, self._options.host):
            raise Refused(403, f"the host {host!r} is not served: a page of another site may have sent this")
        key = self._options.api_key
        if key and scope["path"] not in OPEN:
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), key.encode()):
                raise Refused(
                    401, "the key is missing or wrong: send it as Authorization: Bearer KEY", code="invalid_api_key"
                )


class Events(StreamingResponse):
    """Server-sent events of an answer, which ends with the response, whatever ends that."""

    def __init__(self, first: bytes, rest: AsyncIterator[bytes], answer: Answer) -> None:
        async def all_of_them() -> AsyncIterator[bytes]:
            yield first
            async for event in rest:
                yield event

        super().__init__(all_of_them(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.leave()


async def _whole(served: Served, asked: Request, answer: Answer, body: Body) -> dict[str, Any]:
    pieces = [piece async for piece in answer.pieces()]
    answer.leave()
    text, tokens = "".join(piece.text for piece in pieces), tuple(token for piece in pieces for token in piece.tokens)
    content, calls = _said(served, asked, answer, text)
    return body.whole(Piece(content, tokens), "tool_calls" if calls else answer.finish, answer.usage, calls)


async def _events(served: Served, asked: Request, answer: Answer, body: Body) -> AsyncIterator[bytes]:
    """Where tools are offered, the answer comes as one piece: until its end nobody knows which of it is a call."""
    at_once = isinstance(asked, ChatRequest) and asked.offered
    started, kept, calls = False, list[Piece](), list[Any]()
    try:
        async for piece in answer.pieces():
            if not started and (first := body.first()) is not None:
                yield _event(first)
            started = True
            if at_once:
                kept.append(piece)
            else:
                yield _event(body.piece(piece))
        if not started and (first := body.first()) is not None:
            yield _event(first)
        if at_once:
            content, calls = _said(served, asked, answer, "".join(piece.text for piece in kept))
            tokens = tuple(token for piece in kept for token in piece.tokens)
            yield _event(body.piece(Piece(content, tokens), calls))
    except Exception as error:
        if not started:
            raise
        yield _event(_told(error).body())
        return
    yield _event(body.last("tool_calls" if calls else answer.finish))
    if asked.wants_usage:
        yield _event(body.used(answer.usage))
    yield b"data: [DONE]\n\n"


def _said(served: Served, asked: Request, answer: Answer, text: str) -> tuple[str, list[Any]]:
    if not isinstance(asked, ChatRequest) or not asked.offered:
        return text, []
    said = read_calls(served.loaded.tokenizer, answer.prompt, answer.ids, text, asked.offered)
    return said.content, list(said.calls)


async def _while_there(http: HttpRequest, work: Awaitable[Result]) -> Result:
    """What `work` comes to; it is cancelled when the client goes away. Raises ClientDisconnect then."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _body(http: HttpRequest, limit: int) -> bytes:
    """Raises Refused for another kind than JSON, more than `limit` bytes, or one that does not come."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, f"the request must be application/json, got {kind or 'no content type'!r}")
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in http.stream():
                content += chunk
                if len(content) > limit:
                    raise Refused(413, f"the request has more than {limit} bytes", code="request_too_large")
    except TimeoutError as error:
        raise Refused(408, f"the request did not come within {BODY_SECONDS:.0f} seconds") from error
    return bytes(content)


def _told(error: BaseException) -> Refused:
    """What a client is told; what failed here is in the log too."""
    told = refused(error)
    if told.status == 500:
        LOG.error("a request failed", exc_info=error)
    return told


def _unrouted(http: HttpRequest, error: HTTPException) -> Response:
    known = f"{http.method} {http.url.path} is not here: there are POST {PATHS[0]} and {PATHS[1]}, and GET {PATHS[2]}, "
    return _refusal(Refused(error.status_code, f"{known}{PATHS[3]} and {PATHS[4]}"))


def _refusal(error: Refused) -> Response:
    return _json(error.body(), error.status, error.headers)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def _event(content: Any) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
