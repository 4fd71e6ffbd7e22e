"""A worker: python -m polyquant.loading.in_worker BACKEND answers calls on its standard input until that is closed."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import msgspec

from polyquant.isolated import protocol
from polyquant.support.libraries import installed_version

if TYPE_CHECKING:
    from polyquant.loaded import LoadedModel
    from polyquant.registry.backend import Backend
    from polyquant.registry.observers import Recorder
    from polyquant.request import LoadRequest
    from polyquant.types import HookRecord


class Server:
    """The calls. Each is a method that takes what was sent and answers with what JSON has a form for."""

    def __init__(self, backend: str, stopped: Event) -> None:
        self._name, self._stopped = backend, stopped
        self._model: LoadedModel | None = None
        self._sessions: dict[int, Callable[[Sequence[int]], None]] = {}
        self._count = 0
        self._recorder: Recorder | None = None

    @property
    def records(self) -> list[HookRecord]:
        """Of the hooks called since this was asked last."""
        if self._recorder is None:
            return []
        records, self._recorder.records = self._recorder.records, []
        return records

    @property
    def handle(self) -> Backend:
        """The backend, in this process."""
        from polyquant.registry.backend import Backend
        from polyquant.registry.installed import registry
        from polyquant.registry.observers import Recorder

        if self._recorder is None:
            self._recorder = Recorder()
            registry().add_observer(self._recorder)
        return Backend(self._name, registry())

    @property
    def loaded(self) -> LoadedModel:
        """The model. Raises LookupError before one is loaded."""
        if self._model is None:
            raise LookupError("no model is loaded")
        return self._model

    def problems(self, device: str) -> Any:
        return self.handle.problems(device)

    def load(self, request: Any, settled: Any) -> Any:
        from polyquant.loading.load import load_settled
        from polyquant.loading.settle import Settled

        handle = self.handle
        asked = self._request(request)
        options = msgspec.convert(settled["options"], handle.info.options)
        known = protocol.record(Settled, {**settled, "options": {}})
        handle.require(asked.device)
        loaded = load_settled(handle, asked, msgspec.structs.replace(known, options=options))
        loaded.requested = options
        self._model = loaded
        return {"config": loaded.config, "kernel": loaded.kernel, "notes": loaded.notes, "records": loaded.records}

    def quantize(self, request: Any, config: Any, calibration: list[str], out: str) -> Any:
        handle, asked = self.handle, self._request(request)
        handle.require(asked.device)
        options = msgspec.convert(config, handle.info.options)
        handle._call("quantize", request=asked, config=options, calibration=calibration, out=Path(out))

    def layers(self) -> Any:
        return self.loaded.layers

    def logits(self, tokens: list[int]) -> Any:
        return self.loaded.logits(tokens)

    def tokens(self, ids: list[int], parameters: dict[str, Any]) -> Iterator[Any]:
        made = self.loaded.tokens(ids, **parameters)
        try:
            for token in made:
                if self._stopped.is_set():
                    return
                yield token
        finally:
            made.close()

    def context(self) -> Any:
        return self.loaded.context

    def kv_cache_bytes_per_token(self, tokens: list[int]) -> Any:
        return self.loaded.kv_cache_bytes_per_token(tokens)

    def vocabulary(self) -> Any:
        return self.loaded.vocabulary

    def session(self) -> Any:
        self._count += 1
        self._sessions[self._count] = self.loaded.session()
        return self._count

    def feed(self, session: int, tokens: list[int]) -> Any:
        self._sessions[session](tokens)

    def verify(self, arguments: dict[str, Any], notes: list[str]) -> Any:
        from polyquant.loading.verify import verify

        self.loaded.notes[:] = notes
        return verify(self.loaded, **arguments)

    def save(self, out: str) -> Any:
        self.handle.write(self.loaded, Path(out))

    def forget(self, sessions: Sequence[int]) -> None:
        """Drop the contexts of sessions that nobody uses any more."""
        for session in sessions:
            self._sessions.pop(session, None)

    def _request(self, request: Any) -> Any:
        """The load request, with the model's files as this environment's transformers reads them."""
        from polyquant.models import hf, versions
        from polyquant.request import LoadRequest

        asked = protocol.record(LoadRequest, request)
        asked = msgspec.structs.replace(asked, source=versions.readable(asked.source))
        if asked.attention and self.handle.capabilities.runs_on_torch:
            hf.require_attention(asked.source, asked.attention, trust_remote_code=asked.trust_remote_code)
        if asked.kv_cache != "keep":
            self._require_cache(asked)
        return asked

    def _require_cache(self, asked: LoadRequest) -> None:
        """Raises ConfigError where the model cannot have its key-value cache with this environment's transformers."""
        from polyquant.loading.cache import require_torch
        from polyquant.models import hf, kv_cache

        require_torch(asked.kv_cache, self._name)
        skeleton = hf.skeleton(asked.source, "bfloat16", trust_remote_code=asked.trust_remote_code)
        kv_cache.refuse(asked.source.name, asked.kv_cache, kv_cache.obstacle(skeleton))


CALLS = ("problems", "load", "quantize", "layers", "logits", "tokens", "context", "kv_cache_bytes_per_token",
         "vocabulary", "session", "feed", "verify", "save")  # fmt: skip


def main() -> None:
    """Answer one call after the other."""
    incoming, outgoing = _take_over()
    stopped, calls = Event(), SimpleQueue[Mapping[str, Any]]()
    protocol.send(outgoing, {"protocol": protocol.VERSION, "polyquant": installed_version("polyquant")})
    Thread(target=_listen, args=(incoming, calls, stopped), daemon=True).start()
    server = Server(sys.argv[1], stopped)
    while True:
        asked = calls.get()
        try:
            if asked["call"] not in CALLS:
                raise LookupError(f"no call {asked['call']!r}")
            server.forget(asked["forgotten"])
            stopped.clear()
            answer = getattr(server, asked["call"])(**asked["arguments"])
            _send(outgoing, answer, server)
            del answer  # kept by nobody until the next
        except Exception as error:
            message = {"kind": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
            protocol.send(outgoing, {"error": message, "records": server.records})


def _send(outgoing: int, answer: Any, server: Server) -> None:
    torch = sys.modules.get("torch")
    if isinstance(answer, Iterator):
        for piece in answer:
            protocol.send(outgoing, {"piece": piece})
        answer = None
    if torch is not None and isinstance(answer, torch.Tensor):
        protocol.send(outgoing, {"result": None}, answer)
    else:
        protocol.send(outgoing, {"result": answer, "records": server.records})


def _listen(incoming: int, calls: SimpleQueue[Mapping[str, Any]], stopped: Event) -> None:
    """Take in what is asked, also while another call is answered; end this process when nobody is there to ask."""
    with os.fdopen(incoming, "rb") as pipe:
        while True:
            try:
                message, _ = protocol.receive(pipe)
            except EOFError:
                break
            except protocol.ProtocolError as error:
                print(f"the worker was asked what it cannot read: {error}", file=sys.stderr, flush=True)
                break
            if message.get("call") == "stop":
                stopped.set()
            else:
                calls.put(message)
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _take_over() -> tuple[int, int]:
    """Standard input and output, for the protocol alone: what libraries print goes to standard error."""
    incoming, outgoing = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    return incoming, outgoing


if __name__ == "__main__":
    main()
