"""A model in llama.cpp, through its C interface: weights, one context, and what runs tokens through them."""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as lib
from polyquant.errors import BackendFailed, ConfigError, ModelError
from polyquant.plugin.gguf import Header

from polyquant_llama_cpp._library import captured
from polyquant_llama_cpp.options import LlamaCppOptions

FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}  # enum llama_flash_attn_type
KV_BUFFER = re.compile(r"KV buffer size\s*=\s*([\d.]+) MiB")
Logits = np.ndarray[Any, np.dtype[np.float32]]


class LlamaModel:
    """`loaded.model`. `model`, `context` and `vocab` are llama.cpp's own pointers, freed with this object."""

    def __init__(self, header: Header, config: LlamaCppOptions) -> None:
        """config: with `n_ctx` and `n_threads` settled. Raises ModelError with llama.cpp's own words."""
        lib.llama_backend_init()
        self.header, self.n_ctx, self.n_batch = header, config.n_ctx, min(config.n_batch, config.n_ctx)
        with captured() as self.load_log:
            self.model = lib.llama_model_load_from_file(str(header.path).encode(), _model_params(config))
        if not self.model:
            raise ModelError(f"{header.path.name}: llama.cpp cannot load it: {self.load_log.reason()}")
        self._finalizer = weakref.finalize(self, _free, self.model, None, None)
        with captured() as log:
            self.context = lib.llama_init_from_model(self.model, _context_params(config, self.n_batch))
        if not self.context:
            raise ModelError(f"{header.path.name}: llama.cpp makes no context of {self.n_ctx} tokens: {log.reason()}")
        self.kv_cache_bytes = round(sum(float(size) for size in KV_BUFFER.findall(log.text())) * 2**20)
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.vocabulary = lib.llama_vocab_n_tokens(self.vocab)
        self._batch = lib.llama_batch_init(self.n_batch, 0, 1)
        self._finalizer.detach()
        self._finalizer = weakref.finalize(self, _free, self.model, self.context, self._batch)
        shape = (self.n_batch,)
        self._token, self._pos, self._wanted = (
            np.ctypeslib.as_array(column, shape) for column in (self._batch.token, self._batch.pos, self._batch.logits)
        )
        for index in range(self.n_batch):
            self._batch.n_seq_id[index], self._batch.seq_id[index][0] = 1, 0
        self._lock, self._holder, self._past = Lock(), None, 0

    def run(self, holder: object, before: Sequence[int], tokens: Sequence[int], *, every: bool) -> Logits:
        """Logits, (positions, vocabulary) or where not `every` (1, vocabulary), of `tokens` after those `before`.

        What the context remembers of `holder` is used; where another one has run in between, `before` runs again.
        Raises ConfigError for tokens that are not in the vocabulary, or more than the context holds.
        """
        self._check(before, tokens)
        with self._lock, captured() as log:
            if self._holder is not holder or self._past != len(before):
                self._holder, self._past = None, 0
                lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
                self._decode(before, log, every=False)
            logits = self._decode(tokens, log, every=every)
            self._holder = holder
            return logits

    def _check(self, before: Sequence[int], tokens: Sequence[int]) -> None:
        if not tokens:
            raise ConfigError("there is no token to run: give at least one")
        if (count := len(before) + len(tokens)) > self.n_ctx:
            raise ConfigError(f"{count} tokens do not fit the context of {self.n_ctx}; load with n_ctx={count} or more")
        if min(tokens) < 0 or max(tokens) >= self.vocabulary:
            raise ConfigError(f"tokens go from 0 to {self.vocabulary - 1}, got {min(tokens)} to {max(tokens)}")

    def _decode(self, tokens: Sequence[int], log: Any, *, every: bool) -> Logits:
        rows = np.empty((len(tokens) if every else min(len(tokens), 1), self.vocabulary), np.float32)
        for start in range(0, len(tokens), self.n_batch):
            part = tokens[start : start + self.n_batch]
            count, last = len(part), start + len(part) == len(tokens)
            self._token[:count] = part
            self._pos[:count] = np.arange(self._past, self._past + count)
            self._wanted[:count] = every
            self._wanted[count - 1] = every or last
            self._batch.n_tokens = count
            if code := lib.llama_decode(self.context, self._batch):
                self._holder = None
                raise BackendFailed(f"llama.cpp could not run {count} tokens (code {code}): {log.reason()}")
            self._past += count
            if every or last:
                target = rows[start : start + count] if every else rows
                target[:] = np.ctypeslib.as_array(lib.llama_get_logits(self.context), target.shape)
        return rows


class Session:
    """Tokens that follow each other. Several may take turns on one model."""

    def __init__(self, model: LlamaModel) -> None:
        self._model, self._tokens, self._holder = model, list[int](), object()

    def feed(self, tokens: Sequence[int], *, every: bool = False) -> Logits:
        """Logits after the last of `tokens`, or after each; see LlamaModel.run."""
        tokens = list(tokens)
        logits = self._model.run(self._holder, self._tokens, tokens, every=every)
        self._tokens += tokens
        return logits


def _model_params(config: LlamaCppOptions) -> Any:
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if config.mmap else lib.LLAMA_LOAD_MODE_NONE
    params.use_extra_bufts = config.repack == "on"
    return params


def _context_params(config: LlamaCppOptions, n_batch: int) -> Any:
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = config.n_ctx, n_batch, min(n_batch, 512)
    params.n_threads = params.n_threads_batch = config.n_threads
    params.flash_attn_type = FLASH_ATTENTION[config.flash_attention]
    params.type_k = params.type_v = getattr(lib, f"GGML_TYPE_{config.kv_cache_type}")
    params.offload_kqv = params.op_offload = False
    params.n_outputs_max_per_seq = 0
    return params


def _free(model: int, context: int | None, batch: Any) -> None:
    with captured():
        if batch is not None:
            lib.llama_batch_free(batch)
        if context:
            lib.llama_free(context)
        lib.llama_model_free(model)
