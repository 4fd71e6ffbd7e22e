"""What a tensor is for, and why a dense one is dense: the same words for plans and for loaded models."""

from __future__ import annotations

from typing import Any

from polyquant.types import Role

REASONS: dict[Role, str] = {
    "linear": "not quantized by this backend",
    "experts": "fused expert weights are no Linear modules; this backend leaves them dense",
    "embedding": "embeddings stay dense",
    "head": "the output head stays dense by default",
    "vector": "one-dimensional: norms and biases stay dense",
    "buffer": "a buffer, not a weight",
    "adapter": "an adapter, trained on the frozen base",
    "other": "not a matrix this backend knows",
}
TIED, SKIPPED = "tied to {}", "skipped on request"


def role_of(tensor: Any, module: Any, *, head: Any, is_buffer: bool) -> Role:
    """The role of a tensor of `module`; `head` is the model's output embedding module."""
    kind = type(module).__name__
    if is_buffer:
        return "buffer"
    if tensor.dim() <= 1:
        return "vector"
    if module is head:
        return "head"
    if "Embedding" in kind and "Rotary" not in kind:
        return "embedding"
    if tensor.dim() == 2 and ("Linear" in kind or kind == "Conv1D"):
        return "linear"
    if tensor.dim() == 3:
        return "experts"
    return "other"
