"""The config of a GGUF: transformers', or made here, and whether it says what the file says.

What transformers does not read of a file, it guesses. Imports transformers.
"""

from __future__ import annotations

from math import isclose
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from polyquant.errors import ModelError
from polyquant.models.gguf_fields import config_fields, described, rope_of, rope_scaling
from polyquant.models.gguf_header import Header, read_header

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


def config_of(path: Path) -> Any:
    """The config of a file. Raises ModelError as `gguf_fields`, and whatever transformers raises."""
    header = read_header(path)
    scaling = rope_scaling(header)
    if model_type := described(header):
        config = AutoConfig.for_model(model_type, **config_fields(header, model_type), rope_scaling=scaling)
        config._name_or_path = str(path.parent)
        return config
    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
    if "split.count" in header.metadata:  # it looks for the output head in the first part
        config.get_text_config().tie_word_embeddings = "output.weight" not in header.tensors
    if scaling is not None:
        _scale_rope(config.get_text_config(), scaling)
    return config


def _scale_rope(config: Any, scaling: dict[str, Any]) -> None:
    """Of several kinds of attention, llama.cpp scales the positions of the full one."""
    if rope := getattr(config, "rope_parameters", None):  # transformers 5
        if "full_attention" in rope:
            config.rope_parameters = {**rope, "full_attention": {**rope["full_attention"], **scaling}}
        else:
            config.rope_parameters = {**rope, **scaling}
    else:
        config.rope_scaling = scaling


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


def _taken(config: Any, words: tuple[str, ...]) -> float | None:
    """The number that the model is going to be built with."""
    for word in words:
        found = getattr(config, word, None)
        if word == "rope_theta" and found is None:
            found = rope_of(config).get("rope_theta")
        if word == "head_dim" and found is None and getattr(config, "num_attention_heads", None):
            found = config.hidden_size // config.num_attention_heads
        if isinstance(found, (int, float)):
            return found
    return None


def _otherwise(name: str, key: str, stated: object, taken: object) -> ModelError:
    return ModelError(
        f"{name}: the file says {key} = {stated}, and transformers, which does not read that from a GGUF, takes "
        f"{taken}, with which the model answers wrongly; give the original model, or another runtime of GGUF files "
        "(--backend llama-cpp)"
    )
