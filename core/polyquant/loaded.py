"""A loaded model: what `polyquant.load` returns, and what a backend's `load` hook answers with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from polyquant.errors import PolyquantError, UnsupportedOperation
from polyquant.models.tokens import Decoder, Tokens, pieces
from polyquant.support.shown import Look, Looked
from polyquant.support.sizes import size

if TYPE_CHECKING:
    from polyquant.loading.settle import Settled
    from polyquant.measure.speed import Feed
    from polyquant.models.structured import Schema
    from polyquant.options import BackendOptions
    from polyquant.request import KvCache, LoadRequest
    from polyquant.types import Capabilities, HookRecord, LayerInfo, LayerPlan, WeightInfo

Prompt = str | Sequence[dict[str, str]]
"""Plain text, or chat messages such as [{"role": "user", "content": "Hello"}] for the model's chat template."""
SAMPLE_PROMPT = "The capital of France is"
"""What a loaded model is shown to run with, where nobody says."""


class Owner(Protocol):
    """What a loaded model needs of the `Backend` handle that loaded it."""

    name: str

    @property
    def capabilities(self) -> Capabilities: ...
    def can(self, hook: str) -> bool: ...
    def prepare_for_training(self, loaded: LoadedModel) -> Any: ...
    def describe_layers(self, model: Any) -> list[LayerInfo]: ...
    def plan_layers(self, weights: Sequence[WeightInfo], config: BackendOptions) -> list[LayerPlan]: ...
    def save(self, loaded: LoadedModel, out: Path, *, overwrite: bool = False) -> Path: ...
    def own_fault(self, error: BaseException) -> PolyquantError | None: ...


@dataclass(kw_only=True, repr=False)
class LoadedModel(Looked):
    """A model with its tokenizer and everything known about how it was loaded.

    A backend whose runtime is not torch subclasses this and overrides `logits`, `tokens`, `session` and `context`, and
    `decoder` where its tokenizer has a better way.
    """

    model: Any  # the plain transformers model, in eval mode
    tokenizer: Any = None  # None as a backend gives it: the core reads the model's
    config: BackendOptions  # the effective options
    kernel: str  # what multiplies with the quantized weights
    notes: list[str] = field(default_factory=list)  # what a user should know about this load
    settled: Settled | None = None  # set by the core: what the load came to
    requested: BackendOptions | None = None  # the options before the checkpoint and the device had their say
    request: LoadRequest | None = None  # set by the core
    initial_layers: list[LayerInfo] = field(default_factory=list)  # set by the core: the layers before any forward pass
    tried_bytes: int = 0  # set by the core: what it stored once loading had run a few tokens through it
    records: list[HookRecord] = field(default_factory=list)  # set by the core: time and peak memory of each hook call
    emulated_activations: str = ""  # set by the core: formats that inputs of layers are rounded to in software
    adapter: str = ""  # folder of the adapter on the model; `model` is then PEFT's
    _backend: Owner | None = None

    @property
    def backend(self) -> Owner:
        """The backend that loaded it. Raises PolyquantError for a model that no backend handle has completed."""
        if self._backend is None:
            raise PolyquantError("this model was not loaded through polyquant.load")
        return self._backend

    @property
    def files(self) -> tuple[Path, ...]:
        """Folders and files that it was read from, as far as they are known."""
        source = self.request.source.files if self.request is not None else ()
        return (*source, *((Path(self.adapter),) if self.adapter else ()))

    @property
    def layers(self) -> list[LayerInfo]:
        """Every parameter and buffer as it is now; where there is an adapter, its tensors too, in the role of one."""
        from polyquant.memory.adapted import base_names

        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return base_names(self.backend.describe_layers(base))

    def look(self) -> Look:
        """As it was loaded: a forward pass is not in it."""
        layers = self.initial_layers
        schemes = ", ".join(sorted({layer.scheme for layer in layers if layer.quantized})) or "nothing quantized"
        name = self.request.source.name if self.request is not None else type(self.model).__name__
        by = f" with {self._backend.name}" if self._backend is not None else ""
        on = f" on {self.settled.device}" if self.settled is not None else ""
        adapter = f", adapter {self.adapter}" if self.adapter else ""
        return Look(
            f"{name}{by} ({self.kernel}), {self.config.compute_dtype}{on}{adapter}: "
            f"{size(sum(layer.stored_bytes for layer in layers))}, {sum(layer.quantized for layer in layers)} of "
            f"{len(layers)} tensors in {schemes}",
            notes=self.notes,
        )

    def generate(self, prompt: Prompt, **parameters: Any) -> str:
        """The text that follows `prompt`.

        parameters: those of transformers' `generate`; `template`: switches of the model's chat template, where the
        prompt is messages; `seed`, of what is drawn in sampling; and `schema`: a JSON schema, which the whole answer
        fits as far as `max_new_tokens` lets it end. Raises ConfigError for what the model, or one text, cannot hold.

        >>> loaded.generate([{"role": "user", "content": "Hello"}], template={"enable_thinking": False})
        """
        return "".join(self.stream(prompt, **parameters))

    def stream(
        self, prompt: Prompt, *, template: Mapping[str, Any] | None = None, **generation_parameters: Any
    ) -> Iterator[str]:
        """Like `generate`, in pieces as they come; closing the iterator ends the generation."""
        from polyquant.models.prompts import encode_prompt

        ids = encode_prompt(self.tokenizer, prompt, template)
        return pieces(self.tokens(ids, **generation_parameters), self.decoder())

    def tokens(
        self, ids: Sequence[int], *, seed: int | None = None, top: int | None = None, schema: Schema | None = None,
        **generation_parameters: Any,
    ) -> Tokens:  # fmt: skip
        """The tokens that follow `ids`, as they come. Raises ConfigError as `generate` does, before there are any.

        seed: of what is drawn in sampling; None: torch's generator as it stands. top: give log-probabilities, and those
        of so many of the likeliest tokens. schema: of JSON, which the answer fits; EnvironmentProblem without the
        extra `schema`.
        """
        from polyquant.models.generation import tokens

        return tokens(
            self.model, self.tokenizer, ids, generation_parameters, self.kv_cache, seed=seed, top=top, schema=schema
        )

    def decoder(self) -> Decoder:
        """What makes text of the tokens of one answer."""
        return Decoder(self.tokenizer)

    @property
    def context(self) -> int | None:
        """Tokens that one text, prompt and answer, can have; None where neither config nor model says."""
        from polyquant.models.limits import limits_of

        said = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        known = [count for count in (said, limits_of(self.model).positions) if isinstance(count, int) and count > 0]
        return min(known, default=None)

    def logits(self, tokens: Sequence[int]) -> Any:
        """Logits of one sequence, float32 torch tensor (positions, vocabulary)."""
        from polyquant.models.generation import logits_of

        return logits_of(self.model, tokens)

    def kv_cache_bytes_per_token(self, tokens: Sequence[int]) -> int | None:
        """Bytes by which the state grows with each token of context, measured on `tokens`; None where it is not known.

        0 for a recurrent model, whose state has one size.
        """
        if not self.backend.capabilities.runs_on_torch:
            return None
        from polyquant.memory.storage import tensor_bytes
        from polyquant.models.generation import state_after

        states = [state_after(self.model, run, self.kv_cache) for run in (tokens, [*tokens, *tokens])]
        once, twice = (state and tensor_bytes(state.value) for state in states)
        return None if once is None or twice is None else round((twice - once) / len(tokens))

    @property
    def vocabulary(self) -> int:
        """Token ids that the tokenizer makes and the model takes go from 0 to one less."""
        if not hasattr(self.model, "get_input_embeddings"):  # of a runtime that is not torch's
            return len(self.tokenizer)
        from polyquant.models.limits import limits_of

        return min(len(self.tokenizer), limits_of(self.model).vocabulary)

    def session(self) -> Feed:
        """A new, empty context; each call runs tokens after those before, up to the logits of the last one."""
        from polyquant.models.generation import session

        return session(self.model, self.kv_cache)

    @property
    def kv_cache(self) -> KvCache:
        """How keys and values are kept between tokens, as the load was asked to."""
        return self.request.kv_cache if self.request is not None else "keep"

    def new_cache(self) -> Any:
        """An empty key-value cache as `kv_cache` says, for transformers' own `generate`, which knows nothing of it.

        >>> loaded.model.generate(**inputs, past_key_values=loaded.new_cache())

        Raises UnsupportedOperation where the model is no torch module of this process.
        """
        if not hasattr(self.model, "generate"):
            raise UnsupportedOperation("the model runs elsewhere, with its cache: use generate, stream or session")
        from polyquant.models.generation import new_cache

        return new_cache(self.model, self.kv_cache)

    def save(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write a checkpoint that loads back bit for bit. All or nothing; see `Backend.save`."""
        return self.backend.save(self, Path(out), overwrite=overwrite)
