"""A backend and a model that are in another environment, as this process uses them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from polyquant.errors import EnvironmentProblem, ModelError
from polyquant.isolated.environments import card_in_this_process, environment_of
from polyquant.isolated.worker import START_SECONDS, Worker
from polyquant.loaded import LoadedModel
from polyquant.models.tokens import Token, Tokens
from polyquant.options import BackendOptions
from polyquant.registry.backend import Backend
from polyquant.registry.observers import Call
from polyquant.registry.registry import Registry
from polyquant.support.files import atomic_folder
from polyquant.types import HookRecord, LayerInfo, Problem

if TYPE_CHECKING:
    from polyquant.loading.settle import Settled
    from polyquant.measure.speed import Feed
    from polyquant.request import LoadRequest


class RemoteModel(LoadedModel):
    """A model in a worker of another environment: `model` is that `Worker`, and no torch module."""

    model: Worker

    def tokens(
        self, ids: Sequence[int], *, seed: int | None = None, top: int | None = None, **generation_parameters: Any
    ) -> Tokens:
        """The tokens that follow; parameters must have a form in JSON."""
        given = {"ids": list(ids), "parameters": {**generation_parameters, "seed": seed, "top": top}}
        made = self.model.stream("tokens", **given)
        try:
            for token in made:
                yield msgspec.convert(token, Token)
        finally:
            made.close()

    @property
    def context(self) -> int | None:
        found: int | None = self.model.call("context")
        return found

    def logits(self, tokens: Sequence[int]) -> Any:
        return self.model.tensor("logits", tokens=list(tokens))

    def kv_cache_bytes_per_token(self, tokens: Sequence[int]) -> int | None:
        found: int | None = self.model.call("kv_cache_bytes_per_token", tokens=list(tokens))
        return found

    @property
    def vocabulary(self) -> int:
        return int(self.model.call("vocabulary"))

    def session(self) -> Feed:
        worker, session = self.model, self.model.call("session")

        def feed(tokens: Sequence[int]) -> None:
            worker.call("feed", session=session, tokens=list(tokens))

        weakref.finalize(feed, worker.forget, session)
        return feed


class RemoteBackend(Backend):
    """A backend whose library is in another environment: what needs the library is done by a worker there."""

    answer_seconds = START_SECONDS + Backend.answer_seconds

    def __init__(self, name: str, registry: Registry) -> None:
        super().__init__(name, registry)
        self.info = card_in_this_process(self.info)
        self.environment = environment_of(self.info, registry.distribution(name))
        self._idle: Worker | None = None

    def can(self, hook: str) -> bool:
        return hook != "prepare_for_training" and super().can(hook)

    def problems(self, device: str = "cpu") -> list[Problem]:
        if problem := self.environment.problem():
            return [problem]
        try:
            worker = self._worker()
        except EnvironmentProblem as error:
            what, _, fix = str(error).rpartition("\n  fix: ")
            return [Problem(what=what, fix=fix)]
        found = self._observed(
            "validate_environment", worker, lambda: worker.call("problems", device=device), device=device
        )
        self._idle = worker  # for the load that most often follows
        return msgspec.convert(found, list[Problem])

    def load(self, request: LoadRequest, settled: Settled) -> RemoteModel:
        from polyquant.models import hf

        worker = self._worker(shown=request.progress)
        answer = self._observed(
            "load", worker, lambda: worker.call("load", request=request, settled=settled),
            request=request, config=settled.options,
        )  # fmt: skip
        source = request.source
        try:
            tokenizer = hf.load_tokenizer(source, trust_remote_code=request.trust_remote_code)
        except ModelError:
            worker.close()
            raise
        return RemoteModel(
            model=worker, tokenizer=tokenizer, config=msgspec.convert(answer["config"], self.info.options),
            kernel=answer["kernel"], notes=[*answer["notes"], f"it runs in the environment {self.environment.name}"],
            records=msgspec.convert(answer["records"], list[HookRecord]), request=request, settled=settled,
            _backend=self,
        )  # fmt: skip

    def describe_layers(self, model: Worker) -> list[LayerInfo]:
        found = self._observed("describe_layers", model, lambda: model.call("layers"), model=model)
        return msgspec.convert(found, list[LayerInfo])

    def save(
        self, loaded: LoadedModel, out: Path, *, overwrite: bool = False, accept: Callable[[Path], None] | None = None
    ) -> Path:
        self._require_hook("save")
        with atomic_folder(out, overwrite=overwrite, keeps=loaded.files) as partial:
            worker, folder = loaded.model, str(partial.absolute())
            self._observed("save", worker, lambda: worker.call("save", out=folder), loaded=loaded, out=partial)
            if accept is not None:
                accept(partial)
        return out

    def quantize(
        self, request: LoadRequest, config: BackendOptions, calibration: Sequence[str], out: Path, *,
        overwrite: bool = False, accept: Callable[[Path], None] | None = None,
    ) -> Path:  # fmt: skip
        self._require_hook("quantize")
        with atomic_folder(out, overwrite=overwrite, keeps=request.source.files) as partial:
            worker = self._worker(shown=request.progress)
            try:
                given = {"request": request, "config": config, "calibration": list(calibration)}
                folder = str(partial.absolute())
                self._observed(
                    "quantize", worker, lambda: worker.call("quantize", **given, out=folder), **given, out=partial
                )
            finally:
                worker.close()
            if accept is not None:
                accept(partial)
        return out

    def _observed(self, hook: str, worker: Worker, call: Callable[[], Any], **arguments: Any) -> Any:
        """What the worker answers; observers see it as a call of `hook`, with the memory that the worker needed."""

        def answer(seen: Call) -> Any:
            try:
                return call()
            finally:
                seen.there = next((record for record in worker.records if record.hook == hook), None)

        return self._registry.observed(self.name, hook, answer, **arguments)

    def _worker(self, *, shown: bool = False) -> Worker:
        idle, self._idle = self._idle, None
        if idle is not None and idle.shown == shown:
            return idle
        if idle is not None:
            idle.close()
        return Worker(self.environment, shown=shown)
