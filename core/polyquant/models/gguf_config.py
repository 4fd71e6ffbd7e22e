"""Whether the config that transformers makes of a GGUF says what the file says: what it does not read, it guesses."""

from __future__ import annotations

from math import isclose
from typing import Any

from polyquant.errors import ModelError
from polyquant.models.gguf_header import Header

MEANT = {  # key of the file, less its architecture -> what transformers' configs call it, one or another
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("query_pre_attn_scalar", "head_dim"),  # Gemma scales by it, which no GGUF states
    "attention.value_length": ("v_head_dim", "head_dim"),
    "attention.scale": ("attention_multiplier",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logit_scale", "logits_scaling"),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "rope.freq_base": ("rope_theta",),
}


def require_as_stated(name: str, header: Header, config: Any) -> None:
    """Raises ModelError where a number of the file is another in `config`, which transformers read from it.

    name: of the model. Numbers that the config has no word for cannot be held against it.
    """
    text = config.get_text_config()
    for key, words in MEANT.items():
        stated, taken = header.metadata.get(f"{header.architecture}.{key}"), _taken(text, words)
        if isinstance(stated, bool) or not isinstance(stated, (int, float)) or taken is None:
            continue  # absent, or one for each layer
        if not isclose(stated, taken, rel_tol=1e-4):
            raise _otherwise(name, f"{header.architecture}.{key}", stated, taken)
    rope = _rope(text)
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        for word, usual in (("rope.scaling.type", "none"), ("rope.scale_linear", 1.0)):
            key = f"{header.architecture}.{word}"
            if (scaling := header.metadata.get(key, usual)) != usual:
                raise _otherwise(name, key, scaling, usual)


def _taken(config: Any, words: tuple[str, ...]) -> float | None:
    """The number that the model is going to be built with."""
    for word in words:
        found = getattr(config, word, None)
        if word == "rope_theta" and found is None:
            found = _rope(config).get("rope_theta")
        if word == "head_dim" and found is None and getattr(config, "num_attention_heads", None):
            found = config.hidden_size // config.num_attention_heads
        if isinstance(found, (int, float)):
            return found
    return None


def _rope(config: Any) -> dict[str, Any]:
    """Of transformers 5 the one, before it the other."""
    return getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}


def _otherwise(name: str, key: str, stated: object, taken: object) -> ModelError:
    return ModelError(
        f"{name}: the file says {key} = {stated}, and transformers, which does not read that from a GGUF, takes "
        f"{taken}, with which the model answers wrongly; give the original model, or another runtime of GGUF files "
        "(--backend llama-cpp)"
    )
