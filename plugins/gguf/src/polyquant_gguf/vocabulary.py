"""A tokenizer as GGUF metadata: byte-level BPE, and only where transformers rebuilds the same tokenizer from it."""

from __future__ import annotations

import json
from typing import Any

PRE_TOKENIZERS = ("gpt-2", "llama-bpe", "qwen2", "qwen35", "gpt-4o", "tekken")
"""llama.cpp's names of ways to cut text before merging; the one that gives the same tokens is written."""
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType
SAMPLES = (
    "The quick brown fox doesn't jump over 12 lazy dogs, it's 3.14159 years old.",
    "  two leading spaces,\ttabs\n\n\nand new lines \r\n  ",
    "for (int i = 0; i < 1024; ++i) { x[i] += y_2['key'] * 1e-5; }  # ¿Qué? ÀÉÎõü",
    "你好,世界!これはテストです。 Привет, мир 🙂👩‍🚀 ½ x² ١٢٣",
    "HELLO World iPhone don'T WE'LL 1234567890 \u00a0\u200b end",
)


def express(tokenizer: Any, architecture: str, vocab_size: int) -> dict[str, Any] | None:
    """The metadata keys of `tokenizer`; None where GGUF has no words for it."""
    from transformers.integrations.gguf import convert_gguf_tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    described = json.loads(backend.to_str())
    if described["model"]["type"] != "BPE" or (described.get("decoder") or {}).get("type") != "ByteLevel":
        return None
    tokens = {index: token for token, index in backend.get_vocab(with_added_tokens=True).items()}
    if any(index >= vocab_size for index in tokens):
        return None
    kinds = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in described["added_tokens"]}
    spelled = [tokens.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in described["model"]["merges"]]
    types = [kinds.get(index, NORMAL if index in tokens else UNUSED) for index in range(vocab_size)]
    common = {"tokens": spelled, "token_type": types, "merges": merges}
    for pre in PRE_TOKENIZERS:
        stated = {**common, "tokenizer_type": "gpt2", "pre_tokenizer_type": pre}
        again, _ = convert_gguf_tokenizer(architecture, stated)
        if all(_ids(again, text) == _ids(backend, text) for text in SAMPLES):
            keys = {f"tokenizer.ggml.{name}": value for name, value in common.items() if value}
            return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, **keys, **_flags(tokenizer)}
    return None


def same(one: Any, other: Any) -> bool:
    """Whether two tokenizers give the same ids, with special tokens, and have the same ones."""
    named = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
    return all(getattr(one, name) == getattr(other, name) for name in named) and all(
        one(text).input_ids == other(text).input_ids
        and one.decode(one(text).input_ids) == other.decode(one(text).input_ids)
        for text in SAMPLES
    )


def _ids(backend: Any, text: str) -> list[int]:
    return list(backend.encode(text, add_special_tokens=False).ids)


def _flags(tokenizer: Any) -> dict[str, Any]:
    ids = tokenizer("a").input_ids
    keys: dict[str, Any] = {
        "tokenizer.ggml.add_bos_token": tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
        "tokenizer.ggml.add_eos_token": tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id,
    }
    for name, short in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            keys[f"tokenizer.ggml.{short}_token_id"] = index
    if isinstance(tokenizer.chat_template, str):
        keys["tokenizer.chat_template"] = tokenizer.chat_template
    return keys
