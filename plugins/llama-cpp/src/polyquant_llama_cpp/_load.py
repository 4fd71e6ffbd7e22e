"""Loads a GGUF into llama.cpp, and answers for it under polyquant's names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import psutil
from llama_cpp import llama_cpp as lib
from polyquant.errors import ConfigError, ModelError, PlacementError
from polyquant.plugin import Decoder, Feed, LoadedModel, LoadRequest, Schema, Token, Tokens, fitting
from polyquant.plugin.gguf import Header, read_header

from polyquant_llama_cpp import _layers, _sampling
from polyquant_llama_cpp._checks import require_bytes, require_sound
from polyquant_llama_cpp._runtime import LlamaModel, Session
from polyquant_llama_cpp._tokenizer import LlamaTokenizer, PieceDecoder
from polyquant_llama_cpp.options import LlamaCppOptions

DEFAULT_CONTEXT = 4096  # a key-value cache for the 131072 positions of a Llama 3 8B takes 16 GiB


class LlamaCppModel(LoadedModel):
    """A model that llama.cpp runs: `model` is a LlamaModel and no torch module."""

    model: LlamaModel
    tokenizer: LlamaTokenizer

    def tokens(
        self, ids: Sequence[int], *, seed: int | None = None, top: int | None = None, schema: Schema | None = None,
        **generation_parameters: Any,
    ) -> Tokens:  # fmt: skip
        """The tokens that follow; a parameter that llama.cpp does not follow is a ConfigError."""
        wanted = _sampling.parameters(generation_parameters)
        least, most = wanted.limits(len(ids))
        if (count := len(ids) + most) > self.model.n_ctx:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens, with {most} new ones that is {count}, and the context holds "
                f"{self.model.n_ctx}; ask for fewer, or load with n_ctx={count} or more"
            )
        ends = wanted.ends(self.model.vocabulary, self.tokenizer.end_ids)
        fits = None
        if schema is not None:
            wanted.require_free_end()
            fits = fitting(self.tokenizer, schema, ends, self.tokenizer.for_grammars)
        sampler = _sampling.Sampler(wanted, ids, self.model.vocabulary, self.model.n_ctx, seed, fits)
        return self._tokens(ids, sampler, ends, least, most, top)

    def decoder(self) -> Decoder:
        return PieceDecoder(self.tokenizer)

    @property
    def context(self) -> int:
        return self.model.n_ctx

    def logits(self, tokens: Sequence[int]) -> Any:
        import torch

        return torch.from_numpy(Session(self.model).feed(tokens, every=True))

    def session(self) -> Feed:
        session = Session(self.model)

        def feed(tokens: Sequence[int]) -> None:
            session.feed(tokens)

        return feed

    def kv_cache_bytes_per_token(self, tokens: Sequence[int]) -> int | None:
        return round(self.model.kv_cache_bytes / self.model.n_ctx) or None

    def _tokens(
        self, ids: Sequence[int], sampler: _sampling.Sampler, ends: frozenset[int], least: int, most: int,
        top: int | None,
    ) -> Tokens:  # fmt: skip
        session = Session(self.model)
        for count in range(most):
            logits = session.feed(ids)[-1]
            if count < least:
                logits[list(ends)] = -float("inf")
            made = Token if top is None else _sampling.token_with_logprobs(logits, top)
            token = sampler.choose(logits)
            if token in ends:
                break
            yield made(token)
            ids = [token]


def load(request: LoadRequest, config: LlamaCppOptions) -> LlamaCppModel:
    if request.attention:
        raise ConfigError(f"attention {request.attention!r} is transformers'; llama.cpp has flash_attention")
    if places := sorted({str(place) for place in request.device_map.values()} - {"cpu"}):
        raise PlacementError(f"llama.cpp runs on the cpu here, and the device map names {', '.join(places)}")
    header = read_header(request.source.path / request.source.gguf_file)
    require_sound(header)
    notes: list[str] = []
    config = msgspec.structs.replace(
        config,
        n_ctx=_context(header, config.n_ctx),
        n_threads=config.n_threads or available_threads(),
        repack=_repack(notes) if config.repack == "auto" else config.repack,
    )
    model = LlamaModel(header, config)
    require_bytes(model.vocab, header.path.name)
    if unlike := _layers.unlike_its_name(model, config.type):
        notes.append(unlike)
    for name, size in _layers.extra_buffers(model).items():
        notes.append(f"llama.cpp laid weights out anew for this CPU: {size / 2**20:.0f} MiB beside the file ({name})")
    return LlamaCppModel(
        model=model, tokenizer=LlamaTokenizer(model), config=config, kernel=_layers.kernel(model), notes=notes
    )


def available_threads() -> int:
    """OMP_NUM_THREADS where it is set, else the physical cores, or fewer where the process is held to fewer."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if asked.isdigit() and int(asked):
        return int(asked)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(psutil.cpu_count(logical=False) or 1, allowed or 1)


def _context(header: Header, asked: int) -> int:
    """Tokens of context. Raises ConfigError for more than the model was trained for."""
    trained = header.number("context_length")
    if not trained or trained < 1:
        raise ModelError(
            f"{header.path.name}: {header.architecture}.context_length is {trained}; fetch or write the file again"
        )
    if asked > trained:
        raise ConfigError(f"n_ctx {asked} is more than the {trained} tokens that the model was trained for")
    return asked or min(trained, DEFAULT_CONTEXT)


def _repack(notes: list[str]) -> Literal["on", "off"]:
    """On, but where llama.cpp would repack for AMX: its kernels for that end the process at the first forward pass.

    Seen with 0.3.36 at `ldtilecfg`; llama.cpp's issue 20824 is the same.
    """
    if b"AMX_INT8 = 1" not in (lib.llama_print_system_info() or b""):
        return "on"
    notes.append("weights stay as the file has them: llama.cpp's AMX kernels crash (its issue 20824); see `repack`")
    return "off"
