"""What keys of a GGUF's metadata say of a model that transformers does not read from there, or reads in part.

For these architectures a config is made of the file's keys alone, and a file's keys are made of a config: one table,
read both ways. Keys: ggml's docs/gguf.md, less the architecture that they begin with.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any, NamedTuple

from polyquant.errors import ModelError
from polyquant.models.gguf_header import Header

COMMON: Mapping[str, str] = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
"""Key -> field of transformers' config."""
WITHOUT: Mapping[str, Any] = {"attention.head_count_kv": None, "attention.key_length": None, "rope.freq_base": 10000.0}
"""Keys that a file may lack -> what llama.cpp takes then; None: what follows from others."""
NEUTRAL = ("attn_factor", "yarn_attn_factor", "yarn_ext_factor")
"""Keys of scaled positions that only 1 is read of."""
ORIGINAL_LENGTH = "rope.scaling.original_context_length"
TOKEN_IDS: Mapping[str, str] = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}


class Described(NamedTuple):
    """An architecture of this table."""

    architecture: str  # GGUF's
    fields: Mapping[str, str]  # beside the common ones; "" takes one of those back
    fixed: Mapping[str, Any] = {}  # fields that no key states, as llama.cpp computes
    present: Mapping[str, str] = {}  # fields that say whether there is a tensor -> its name
    has_experts: bool = False
    yarn: Mapping[str, Any] | None = None  # what no key states of YaRN; None: it is not read

    @property
    def keys(self) -> dict[str, str]:
        """Key -> field."""
        return {key: field for key, field in {**COMMON, **self.fields}.items() if field}


FLOATS = ("epsilon", "scale")
"""How keys end whose numbers are floats, whatever a config has there."""
BIAS = {"attention_bias": "blk.0.attn_q.bias"}
DESCRIBED: Mapping[str, Described] = {
    "mixtral": Described(
        "llama",
        {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        has_experts=True,
    ),
    "qwen2_moe": Described(
        "qwen2moe",
        {
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        {"norm_topk_prob": False},
        has_experts=True,
    ),
    "qwen3_moe": Described(
        "qwen3moe",
        {
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        {"norm_topk_prob": True},
        has_experts=True,
    ),
    "gpt_oss": Described(
        "gpt-oss",
        {
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "intermediate_size",
            "attention.sliding_window": "sliding_window",
        },
        has_experts=True,
        yarn={"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    ),
    "olmoe": Described(
        "olmoe",
        {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"},
        {"norm_topk_prob": False},
        BIAS,
        has_experts=True,
    ),
    "olmo2": Described("olmo2", {}, present=BIAS),
    "granite": Described(
        "granite",
        {
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        present=BIAS | {"mlp_bias": "blk.0.ffn_up.bias"},
    ),
    "cohere": Described(
        "command-r",
        {
            "attention.layer_norm_rms_epsilon": "",
            "attention.layer_norm_epsilon": "layer_norm_eps",
            "logit_scale": "logit_scale",
        },
        present=BIAS | {"use_qk_norm": "blk.0.attn_q_norm.weight"},
    ),
    "gemma": Described("gemma", {}, present=BIAS),
    "smollm3": Described("smollm3", {}, present=BIAS),
    "ernie4_5": Described("ernie4_5", {}, present={"use_bias": "blk.0.attn_q.bias"}),
    "seed_oss": Described("seed_oss", {}, present=BIAS),
    "arcee": Described("arcee", {}, present=BIAS),
}
"""transformers' model_type -> how GGUF files describe such models."""


def described(header: Header) -> str | None:
    """The model_type of the table that a file is of; None where transformers reads its config."""
    has_experts = (header.number("expert_count") or 0) > 0
    for model_type, own in DESCRIBED.items():
        if (own.architecture, own.has_experts) == (header.architecture, has_experts):
            return model_type
    return None


def config_fields(header: Header, model_type: str) -> dict[str, Any]:
    """The fields of the config that the file's keys state. Raises ModelError where one is missing or no number."""
    own, fields = DESCRIBED[model_type], dict[str, Any]()
    for key, field in own.keys.items():
        whole = f"{header.architecture}.{key}"
        value = header.metadata.get(whole, WITHOUT.get(key))
        if value is None and key in WITHOUT:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            found = "is missing" if value is None else f"is {value!r:.60}"
            raise ModelError(f"{header.path.name}: {whole} {found}, a number was expected; fetch or write it again")
        if fields.setdefault(field, value) != value:
            raise ModelError(
                f"{header.path.name}: two of its keys contradict each other: {field} is {value} in {whole}"
            )
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    if (embedding := header.tensors.get("token_embd.weight")) is None:
        raise ModelError(f"{header.path.name} has no token_embd.weight; fetch or write it again")
    fields["vocab_size"] = embedding.shape[0]
    fields["tie_word_embeddings"] = "output.weight" not in header.tensors
    for word, field in TOKEN_IDS.items():
        fields[field] = header.metadata.get(f"tokenizer.ggml.{word}_token_id")
    there = {field: tensor in header.tensors for field, tensor in own.present.items()}
    return {**fields, **own.fixed, **there}


def keys_of(config: Any) -> dict[str, Any] | None:
    """The keys, with the architecture, of a config of the table; None for one that is not in it."""
    if (own := DESCRIBED.get(config.model_type)) is None:
        return None
    keys = {key: getattr(config, field, None) for key, field in own.keys.items() if field != "rope_theta"}
    keys["vocab_size"] = config.vocab_size
    keys |= {key: float(value) for key, value in keys.items() if value is not None and key.endswith(FLOATS)}
    return {f"{own.architecture}.{key}": value for key, value in keys.items() if value is not None}


def rope_of(config: Any) -> dict[str, Any]:
    """The rotary positions of a config, as transformers 5 or 4 has them; of several kinds, those of full attention."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return dict(rope.get("full_attention") or rope)


def rope_scaling(header: Header) -> dict[str, Any] | None:
    """How a file scales rotary positions, in transformers' words; None: not at all.

    Raises ModelError for a kind that is not read, or that the file does not describe.
    """
    begin = f"{header.architecture}.rope.scaling"
    kind, factor = header.metadata.get(f"{begin}.type", "none"), header.metadata.get(f"{begin}.factor")
    old = header.metadata.get(f"{header.architecture}.rope.scale_linear", 1.0)
    if kind == "none" and old != 1.0:  # as older files have it
        kind, factor = "linear", old
    if kind == "none":
        return None
    yarn = DESCRIBED[model_type].yarn if (model_type := described(header)) else None
    if kind != "linear" and (kind != "yarn" or yarn is None):
        raise ModelError(
            f"{header.path.name}: the file says {begin}.type = {kind!s:.40}, and of {header.architecture} files linear"
            f"{'' if yarn is None else ' and yarn'} is read; give the original model, or another runtime of GGUF files "
            "(--backend llama-cpp)"
        )
    more = {key: header.metadata.get(f"{begin}.{key}", 1.0) for key in NEUTRAL}
    if not isinstance(factor, float) or not 0 < factor < inf or any(value != 1.0 for value in more.values()):
        raise ModelError(
            f"{header.path.name}: {begin} has the factor {factor} and {more}; a positive number, and 1, are read"
        )
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    length = header.number(ORIGINAL_LENGTH) or header.number("context_length")
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length, **(yarn or {})}


def rope_keys(config: Any, architecture: str) -> dict[str, Any]:
    """The keys of what `rope_scaling` reads; none for positions that are scaled otherwise, or not at all."""
    rope, begin = rope_of(config), f"{architecture}.rope.scaling"
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in ("linear", "yarn"):
        return {}
    keys = {f"{begin}.type": kind, f"{begin}.factor": float(rope["factor"])}
    length = rope.get("original_max_position_embeddings") if kind == "yarn" else None
    return keys | ({f"{architecture}.{ORIGINAL_LENGTH}": length} if length else {})
