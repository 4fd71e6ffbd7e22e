"""What is checked of a GGUF before llama.cpp reads it: values on which it ends the process instead of giving an error.

Found by changing one value at a time in files and loading them, with llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import isfinite

from llama_cpp import llama_cpp as lib
from polyquant.errors import ModelError
from polyquant.plugin.gguf import Header, read_strings

MAX_BLOCKS = MAX_EXPERTS = 512  # LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS
SENTENCEPIECE, BYTE, BYTES = 1, 1 << 5, 256  # enum llama_vocab_type, llama_token_attr
TOKENS = "tokenizer.ggml.tokens"
EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "attention.group_norm_epsilon")


def require_sound(header: Header) -> None:
    """Raises ModelError for a file that llama.cpp would crash on, or that is no causal language model."""

    def refuse(what: str) -> None:
        raise ModelError(f"{header.path.name}: {what}; fetch or write the file again")

    if header.metadata.get("tokenizer.ggml.model") in (None, "none", "no_vocab"):
        refuse("it holds no tokenizer, and llama.cpp has no other")
    if header.metadata.get(f"{header.architecture}.attention.causal") is False:
        raise ModelError(f"{header.path.name} is not a causal language model: its attention looks both ways")
    blocks = header.number("block_count")
    if blocks is None or not 1 <= blocks <= min(MAX_BLOCKS, len(header.tensors)):
        refuse(f"block_count is {blocks}, and there are {len(header.tensors)} tensors")
    experts, used = header.number("expert_count") or 0, header.number("expert_used_count") or 0
    if experts > MAX_EXPERTS or not (1 <= used <= experts if experts else used == 0):
        refuse(f"expert_count is {experts} and expert_used_count {used}")
    for entry in header.tensors.values():
        if len(entry.shape) == 1 and entry.type.name != "F32":
            refuse(f"{entry.name} is one-dimensional and {entry.type.name}; llama.cpp runs such tensors in F32 only")
    _require_whole_vocabulary(header, refuse)
    for name in EPSILONS:
        value = header.metadata.get(f"{header.architecture}.{name}", 0.0)
        if not isinstance(value, float) or not isfinite(value) or value < 0:
            refuse(f"{name} is {value}")


def _require_whole_vocabulary(header: Header, refuse: Callable[[str], None]) -> None:
    tokens = header.metadata.get(TOKENS)
    if not isinstance(tokens, range) or TOKENS not in header.string_arrays:
        refuse(f"{TOKENS} is no list of strings")
        return
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        other = header.metadata.get(key, tokens)
        if other != tokens:
            refuse(f"{key} holds {other}, and there are {len(tokens)} tokens")
    read = [token.partition(b"\0")[0] for token in read_strings(header, TOKENS)]  # as llama.cpp does: up to a zero
    twice = [token for token, count in Counter(read).items() if count > 1 and token]
    if twice:
        refuse(f"{len(twice)} tokens come twice, such as {twice[0].decode(errors='replace')!r}")


def require_bytes(vocab: int, name: str) -> None:
    """Raises ModelError where a SentencePiece vocabulary lacks the tokens of single bytes, which any text may need."""
    if lib.llama_vocab_type(vocab) != SENTENCEPIECE:
        return
    tokens = range(lib.llama_vocab_n_tokens(vocab))
    if (found := sum(bool(lib.llama_vocab_get_attr(vocab, token) & BYTE) for token in tokens)) < BYTES:
        raise ModelError(f"{name}: its vocabulary has {found} of the {BYTES} tokens for single bytes; write it again")
