"""A transformers config and tokenizer as GGUF metadata.

The config by the inverse of the table transformers itself reads GGUF configs with; the tokenizer where it is byte-level
BPE, and only where transformers rebuilds the same one from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from polyquant.errors import SaveError
from polyquant.plugin.gguf import keys_of, rope_keys

from polyquant_gguf.names import ARCHITECTURES, MIXTURES, Rules, rules_for

GENERATION_CONFIG = "generation_config.json"
NOT_COMPARED = {
    "_name_or_path",
    "_model_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "quantization_config",
    "initializer_range",
    "attention_dropout",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "output_router_logits",
    "use_cache",
    "pretraining_tp",
    "model_type",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
}
"""Fields that change no logits: names, training, and token ids, which the tokenizer and generation config have."""
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


def architecture_of(config: Any) -> tuple[str, Rules]:
    """GGUF's name of the architecture. Raises SaveError for one that this backend cannot write."""
    if (found := rules_for(config.model_type)) is None:
        known = ", ".join(rules.model_type for table in (ARCHITECTURES, MIXTURES) for rules in table.values())
        raise SaveError(f"no GGUF can be written for {config.model_type!r} models; only for {known}")
    return found


def model_keys(config: Any, architecture: str) -> dict[str, Any]:
    """Metadata keys and values of the model's shape."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    keys: dict[str, Any] = {
        "general.name": Path(config._name_or_path or architecture).name,
        "general.quantization_version": 2,
    }
    if own := keys_of(config):
        keys |= own | {f"{architecture}.rope.freq_base": _rope_theta(config)}
    else:
        for key, field in GGUF_CONFIG_MAPPING[architecture].items():
            value = _rope_theta(config) if field == "rope_theta" else getattr(config, field or "", None)
            if value is not None:
                keys[f"{architecture}.{key}"] = value
    width = getattr(config, "head_dim", None)
    if width and width != config.hidden_size // config.num_attention_heads:  # what llama.cpp takes where nobody says
        keys |= {f"{architecture}.attention.{name}_length": width for name in ("key", "value")}
    return keys | rope_keys(config, architecture)


def token_ids(config: Any) -> dict[str, Any]:
    """The ids of the config that a GGUF can hold: one of each kind."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {f"tokenizer.ggml.{short}_token_id": getattr(config, name, None) for name, short in names.items()}
    return {key: value for key, value in found.items() if isinstance(value, int)}


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    """One key, in the type llama.cpp has it in."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def require_same_config(config: Any, read: Any) -> None:
    """Raises SaveError where the config that transformers reads from the written file differs from the model's."""
    before, after = _described(config), _described(read)
    known = {*type(config)().to_dict(), "head_dim"}  # other words of a config.json are read by no model's code
    fields = ((set(before) | set(after)) & known) - NOT_COMPARED
    changed = [name for name in sorted(fields) if not _equal(before.get(name), after.get(name))]
    if changed:
        shown = "; ".join(f"{name}: {before.get(name)!r} would be read as {after.get(name)!r}" for name in changed[:3])
        raise SaveError(f"GGUF metadata cannot express this model for transformers: {shown}")


def tokenizer_keys(tokenizer: Any, architecture: str, vocab_size: int) -> dict[str, Any] | None:
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


def same_tokenizer(one: Any, other: Any) -> bool:
    """Whether two tokenizers give the same ids, with special tokens, and have the same ones."""
    named = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
    return all(getattr(one, name) == getattr(other, name) for name in named) and all(
        one(text).input_ids == other(text).input_ids
        and one.decode(one(text).input_ids) == other.decode(one(text).input_ids)
        for text in SAMPLES
    )


def _described(config: Any) -> dict[str, Any]:
    """The config's fields; a head size that is left out is the one that follows from the others, and what is said of
    windows says nothing where there are none."""
    fields = dict(config.to_dict())
    if fields.get("use_sliding_window") is False:
        fields.pop("max_window_layers", None)
    if fields.get("head_dim") is None:
        fields["head_dim"] = config.hidden_size // config.num_attention_heads
    return fields


def _equal(one: Any, other: Any) -> bool:
    """Numbers as float32, which is what GGUF holds."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, float) and isinstance(other, float):
        return bool(np.float32(one) == np.float32(other))
    return bool(one == other)


def _rope_theta(config: Any) -> Any:
    """Since transformers 5 in `rope_parameters`, for some models one set for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention", parameters)
    return float(parameters.get("rope_theta", getattr(config, "rope_theta", 10000.0)))


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
