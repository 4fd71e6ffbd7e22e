"""Parameters of transformers' `generate`, and llama.cpp's samplers put together for them."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from llama_cpp import llama_cpp as lib
from msgspec import Meta
from polyquant.errors import ConfigError, did_you_mean
from polyquant.plugin import LEAST_LOGPROB, Fitting, Token, likeliest

from polyquant_llama_cpp._library import captured
from polyquant_llama_cpp._runtime import Logits

Count = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # struct llama_token_data


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Those of `generate` that llama.cpp can follow, with generate's defaults. None: not given."""

    max_new_tokens: Count | None = None
    max_length: Count | None = None  # prompt included
    min_new_tokens: Annotated[int, Meta(ge=0)] | None = None
    min_length: Annotated[int, Meta(ge=0)] | None = None  # prompt included
    do_sample: bool = False
    temperature: Annotated[float, Meta(gt=0)] | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None  # 0: off
    top_p: Share | None = None
    min_p: Share | None = None
    typical_p: Share | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] = 1.0
    eos_token_id: int | tuple[int, ...] | None = None  # None: those that the model names
    num_beams: Literal[1] = 1
    num_return_sequences: Literal[1] = 1

    def __post_init__(self) -> None:
        for one, other in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"give {one} or {other}, not both")
        shaping = ("temperature", "top_k", "top_p", "min_p", "typical_p")
        if idle := [name for name in shaping if getattr(self, name) is not None and not self.do_sample]:
            raise ValueError(f"{', '.join(idle)} shape sampling: give do_sample=True with them, or leave them out")

    def limits(self, prompt: int) -> tuple[int, int]:
        """(fewest, most) new tokens after `prompt` tokens; 20 as in transformers where nothing is said."""
        least, most = self.min_new_tokens or 0, self.max_new_tokens or 20
        if self.min_length is not None:
            least = max(self.min_length - prompt, 0)
        if self.max_length is not None:
            most = self.max_length - prompt
        if most < 1:
            raise ConfigError(f"the prompt has {prompt} tokens, and max_length {self.max_length} leaves room for none")
        if least > most:
            raise ConfigError(f"at least {least} new tokens are asked for, and at most {most}")
        return least, most

    def require_free_end(self) -> None:
        """Raises ConfigError where a text may not end where it is whole."""
        if self.min_new_tokens or self.min_length:
            raise ConfigError(
                "an answer that fits a schema ends where it is whole: leave min_new_tokens and min_length out"
            )

    def ends(self, vocabulary: int, of_the_model: frozenset[int]) -> frozenset[int]:
        """The tokens that end the generation. Raises ConfigError where one is not in the vocabulary."""
        if self.eos_token_id is None:
            return of_the_model
        ends = frozenset([self.eos_token_id] if isinstance(self.eos_token_id, int) else self.eos_token_id)
        if any(not 0 <= token < vocabulary for token in ends):
            raise ConfigError(f"eos_token_id must be from 0 to {vocabulary - 1}, got {self.eos_token_id}")
        return ends


def parameters(given: Mapping[str, Any]) -> Parameters:
    """Raises ConfigError for what llama.cpp does not follow, or a value out of range."""
    known = Parameters.__struct_fields__
    for name in given:
        if name not in known:
            raise ConfigError(
                f"{name!r} is no generation parameter that llama.cpp follows here; there are {', '.join(known)}."
                f"{did_you_mean(name, known)}"
            )
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    try:
        return msgspec.convert(values, Parameters)
    except msgspec.ValidationError as error:
        raise ConfigError(f"generation parameters: {error}") from error


class Sampler:
    """Chooses the next token: the greatest logit, or llama.cpp's samplers in the order of transformers' processors."""

    def __init__(
        self, wanted: Parameters, prompt: Sequence[int], vocabulary: int, n_ctx: int, seed: int | None = None,
        fits: Fitting | None = None,
    ) -> None:  # fmt: skip
        """seed: of what is drawn; None: torch's generator decides, as it does for transformers' generate. fits: what
        the answer has to fit."""
        self._chain, self._fits = None, fits
        if wanted.do_sample or wanted.repetition_penalty != 1.0:
            with captured():
                self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
                weakref.finalize(self, lib.llama_sampler_free, self._chain)
                for sampler in _samplers(wanted, vocabulary, n_ctx, seed):
                    lib.llama_sampler_chain_add(self._chain, sampler)
                for token in prompt:
                    lib.llama_sampler_accept(self._chain, token)

    def choose(self, logits: Logits) -> int:
        """logits: (vocabulary,); those that do not fit become minus infinity."""
        if self._fits is not None:
            bits = np.frombuffer(self._fits.allowed(), np.uint8)
            logits[np.unpackbits(bits, count=len(logits), bitorder="little") == 0] = -np.inf
        token = self._chosen(logits)
        if self._fits is not None:
            self._fits.take(token)
        return token

    def _chosen(self, logits: Logits) -> int:
        if self._chain is None:
            return int(logits.argmax())
        candidates = np.zeros(len(logits), CANDIDATE)
        candidates["id"], candidates["logit"] = np.arange(len(logits)), logits
        array = lib.llama_token_data_array(
            data=ctypes.cast(candidates.ctypes.data, lib.llama_token_data_p), size=len(logits), selected=-1,
            sorted=False,
        )  # fmt: skip
        lib.llama_sampler_apply(self._chain, ctypes.byref(array))
        token = int(array.data[array.selected].id)
        lib.llama_sampler_accept(self._chain, token)
        return token


def _samplers(wanted: Parameters, vocabulary: int, n_ctx: int, seed: int | None) -> list[Any]:
    chosen = []
    if wanted.repetition_penalty != 1.0:
        chosen.append(lib.llama_sampler_init_penalties(vocabulary, n_ctx, wanted.repetition_penalty, 0.0, 0.0))
    if not wanted.do_sample:
        return [*chosen, lib.llama_sampler_init_greedy()]
    import torch

    if wanted.temperature is not None:
        chosen.append(lib.llama_sampler_init_temp(wanted.temperature))
    top_k = 50 if wanted.top_k is None else wanted.top_k
    if top_k:
        chosen.append(lib.llama_sampler_init_top_k(top_k))
    for value, make in (
        (wanted.top_p, lib.llama_sampler_init_top_p),
        (wanted.min_p, lib.llama_sampler_init_min_p),
        (wanted.typical_p, lib.llama_sampler_init_typical),
    ):
        if value is not None:
            chosen.append(make(value, 1))
    drawn = int(torch.randint(2**32 - 1, ())) if seed is None else seed % (2**32 - 1)
    return [*chosen, lib.llama_sampler_init_dist(drawn)]


def token_with_logprobs(logits: Logits, top: int) -> Callable[[int], Token]:
    """A token that is chosen from `logits`, (vocabulary,), with log-probabilities: its own, and of the likeliest."""
    shifted = logits.astype(np.float64) - logits.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    best = np.argpartition(-logprobs, top)[:top] if top < len(logprobs) else np.arange(len(logprobs))
    top_of_them = likeliest((int(i), logprobs[i]) for i in best)
    return lambda token: Token(token, max(float(logprobs[token]), LEAST_LOGPROB), top_of_them)
