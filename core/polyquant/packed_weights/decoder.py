"""What a decoder of Llama's shape is made of, read from its modules: for the kernels' whole step. Imports torch.

The families are those whose code is known to compute what the kernels do. A model of one is asked besides, before its
step is used: both ways have to agree on a few tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyquant.packed_weights.half import HalfEmbedding
from polyquant.packed_weights.linear import RepackedLinear
from polyquant.packed_weights.vocabulary import RepackedEmbedding

AROUND = {"before_attention": "input_layernorm", "before_mlp": "post_attention_layernorm"}
AFTER = {"after_attention": "post_attention_layernorm", "after_mlp": "post_feedforward_layernorm"}
FAMILIES: dict[str, dict[str, str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3", "gemma"), AROUND),
    "olmo2": AFTER,
    **dict.fromkeys(("gemma2", "gemma3_text"), AROUND | AFTER | {"before_mlp": "pre_feedforward_layernorm"}),
}
"""model_type -> the names of the norms around attention and MLP."""
LESS_ONE = ("gemma", "gemma2", "gemma3_text")
"""Families whose norms are kept less 1."""
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1}


class NormOf(NamedTuple):
    """A norm over `weight`'s elements."""

    weight: Tensor
    epsilon: float
    extra: float


class LayerOf(NamedTuple):
    """One decoder layer: its norms and linear layers by the kernels' names; those that are not there are left out."""

    norms: dict[str, NormOf]
    linears: dict[str, RepackedLinear]
    window: int  # positions that it sees; 0: all
    rotation: str  # the type of layer that its rotation is for; empty: the model has one
    rotates: bool


class Decoder(NamedTuple):
    """A decoder whose steps the kernels can make."""

    layers: list[LayerOf]
    last: NormOf
    hidden: int
    heads: int
    key_heads: int
    width: int  # of a head
    attention_scale: float
    attention_cap: float
    residual_scale: float
    embedding_scale: float
    activation: int
    whole_norms: bool  # queries and keys are normalized over all heads

    @property
    def rotations(self) -> list[str]:
        """Types of layers that are rotated in their own ways, in the order of their numbers."""
        return list(dict.fromkeys(layer.rotation for layer in self.layers if layer.rotates))


def decoder_of(model: Any) -> Decoder | None:
    """The decoder of `model`, a causal language model's inner one; None where the kernels do not know its shape."""
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", "")
    if family not in FAMILIES or getattr(config, "use_bidirectional_attention", False):
        return None
    try:
        return _read(model, config, family)
    except (AttributeError, KeyError, TypeError):  # built otherwise than its family is
        return None


def _read(model: Any, config: Any, family: str) -> Decoder | None:
    layers = [_layer(layer, config, family) for layer in model.layers[: config.num_hidden_layers]]
    attention = model.layers[0].self_attn
    width = attention.head_dim
    if any(layer is None for layer in layers) or _answers(model.embed_tokens) != torch.float32:
        return None
    kept = [layer for layer in layers if layer is not None]
    query_norm = kept[0].norms.get("query_norm")
    return Decoder(
        layers=kept,
        last=_norm(model.norm, family),
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        width=width,
        attention_scale=attention.scaling,
        attention_cap=getattr(attention, "attn_logit_softcapping", None) or 0.0,
        residual_scale=getattr(model.layers[0], "residual_multiplier", 1.0),
        embedding_scale=getattr(model, "embedding_multiplier", 1.0),
        activation=ACTIVATIONS[getattr(config, "hidden_activation", None) or config.hidden_act],
        whole_norms=query_norm is not None and query_norm.weight.numel() != width,
    )


def _answers(embedding: Any) -> torch.dtype:
    """The dtype of an embedding's rows."""
    own = isinstance(embedding, (RepackedEmbedding, HalfEmbedding))
    dtype: torch.dtype = embedding.dtype if own else embedding.weight.dtype
    return dtype


def _layer(layer: Any, config: Any, family: str) -> LayerOf | None:
    attention, mlp = layer.self_attn, layer.mlp
    norms = {name: _norm(getattr(layer, own), family) for name, own in FAMILIES[family].items()}
    for name, own in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
        if hasattr(attention, own):
            norms[name] = _norm(getattr(attention, own), family)
    if hasattr(attention, "qkv_proj"):
        linears = {"query": attention.qkv_proj, "gate": mlp.gate_up_proj}
    else:
        linears = {
            "query": attention.q_proj, "key": attention.k_proj, "value": attention.v_proj, "gate": mlp.gate_proj,
            "up": mlp.up_proj,
        }  # fmt: skip
    linears |= {"output": attention.o_proj, "down": mlp.down_proj}
    if not all(_is_plain(linear) for linear in linears.values()):
        return None
    window = getattr(attention, "sliding_window", None)
    if not hasattr(attention, "sliding_window") and family in ("mistral", "phi3"):
        window = config.sliding_window
    rotation = getattr(attention, "layer_type", "") if family == "gemma3_text" else ""
    return LayerOf(norms, linears, window or 0, rotation, bool(getattr(attention, "use_rope", True)))


def _is_plain(linear: Any) -> bool:
    """Whether it is a packed layer, all rows and columns of which are the model's own, and computes on the CPU."""
    if type(linear) is not RepackedLinear or linear.qweight.device.type != "cpu":
        return False
    bias = linear.bias
    whole = linear.packed.padded == (linear.out_features, linear.in_features)
    return whole and (bias is None or bias.dtype == torch.float32)


def _norm(norm: Any, family: str) -> NormOf:
    epsilon = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    if norm.weight.dtype != torch.float32 or not norm.weight.is_contiguous():
        raise TypeError("norms of another dtype are not the kernels'")
    return NormOf(norm.weight.detach(), epsilon, 1.0 if family in LESS_ONE else 0.0)
