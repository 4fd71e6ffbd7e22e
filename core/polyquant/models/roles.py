"""What a tensor is for, and why a dense one is dense: the same words for plans and for loaded models."""

from __future__ import annotations

from collections.abc import Callable
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
    "tower": "vision and audio parts stay dense",
    "other": "not a matrix this backend knows",
}
TIED, SKIPPED = "tied to {}", "skipped on request"


def beside_the_language_model(model: Any) -> Callable[[str], bool]:
    """Whether the module of that name belongs to a vision or audio tower, or to what joins it to the language model."""
    if model.config.get_text_config() is model.config:
        return lambda name: False
    inside = {id(module) for part in (model.get_decoder(), model.get_output_embeddings()) if part is not None
              for module in part.modules()}  # fmt: skip
    outside = {name for name, module in model.named_modules() if id(module) not in inside}
    return lambda name: name in outside


def role_of(tensor: Any, module: Any, *, head: Any, is_buffer: bool, tower: bool = False) -> Role:
    """The role of a tensor of `module`; `head` is the output embedding, a tower stands beside all that."""
    kind = type(module).__name__
    if is_buffer:
        return "buffer"
    if tensor.dim() <= 1:
        return "vector"
    if module is head:
        return "head"
    if tower:
        return "tower"
    if "Embedding" in kind and "Rotary" not in kind:
        return "embedding"
    if tensor.dim() == 2 and ("Linear" in kind or kind == "Conv1D"):
        return "linear"
    if tensor.dim() == 3:
        return "experts"
    return "other"
