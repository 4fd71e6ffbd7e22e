"""A transformers config as GGUF metadata: the inverse of the table transformers itself reads GGUF configs with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from polyquant.errors import SaveError

from polyquant_gguf.names import ARCHITECTURES, Rules

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
    "use_cache",
    "pretraining_tp",
    "model_type",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
}
"""Fields that change no logits: names, training, and token ids, which the tokenizer and generation config have."""


def architecture_of(config: Any) -> tuple[str, Rules]:
    """GGUF's name of the architecture. Raises SaveError for one that this backend cannot write."""
    found = {rules.model_type: (name, rules) for name, rules in ARCHITECTURES.items()}
    if config.model_type not in found:
        raise SaveError(f"no GGUF can be written for {config.model_type!r} models; only for {', '.join(found)}")
    return found[config.model_type]


def model_keys(config: Any, architecture: str) -> dict[str, Any]:
    """Metadata keys and values of the model's shape."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    keys: dict[str, Any] = {
        "general.name": Path(config._name_or_path or architecture).name,
        "general.quantization_version": 2,
    }
    for key, field in GGUF_CONFIG_MAPPING[architecture].items():
        value = _rope_theta(config) if field == "rope_theta" else getattr(config, field or "", None)
        if value is not None:
            keys[f"{architecture}.{key}"] = value
    return keys


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


def require_same(config: Any, read: Any) -> None:
    """Raises SaveError where the config that transformers reads from the written file differs from the model's."""
    before, after = _described(config), _described(read)
    fields = (set(before) | set(after)) - NOT_COMPARED
    changed = [name for name in sorted(fields) if not _equal(before.get(name), after.get(name))]
    if changed:
        shown = "; ".join(f"{name}: {before.get(name)!r} would be read as {after.get(name)!r}" for name in changed[:3])
        raise SaveError(f"GGUF metadata cannot express this model for transformers: {shown}")


def _described(config: Any) -> dict[str, Any]:
    """The config's fields; a head size that is left out is the one that follows from the others."""
    fields = dict(config.to_dict())
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
