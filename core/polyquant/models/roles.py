"""What a tensor is for, and why a dense one is dense: the same words for plans and for loaded models."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from polyquant.types import Role

REASONS: dict[Role, str] = {
    "linear": "not quantized by this backend",
    "experts": "fused expert weights are no Linear modules; this backend leaves them dense",
    "embedding": "embeddings stay dense",
    "head": "the output head stays dense by default",
    "convolution": "convolutions stay dense",
    "custom": "its module does more than multiply, and runs dense only",
    "vector": "one-dimensional, or no layer's weight: norms, biases and states stay dense",
    "buffer": "a buffer, not a weight",
    "adapter": "an adapter, trained on the frozen base",
    "tower": "vision and audio parts stay dense",
    "other": "not a matrix this backend knows",
}
MODEL_CODE = ("transformers.models.", "transformers_modules.")
"""Where the classes of models come from; others are those of libraries and plugins, in place of them."""
OWN_LINEAR = r"Linear$|^Linear\w{0,6}$"  # MoshiLinear, Linear4bit, LinearFP8
"""Names of Linear classes in the code of models."""
ALWAYS_DENSE: tuple[Role, ...] = ("embedding", "tower", "custom")
"""Roles whose tensors are dense whether or not somebody asks for it."""
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
    owner: Any = type(module)
    kind = owner.__name__
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
    if kind.startswith("Conv") and kind.endswith("d") and hasattr(module, "kernel_size"):
        return "convolution"
    if tensor.dim() == 2 and is_linear_module(module):
        return "custom" if does_more(owner) else "linear"
    if tensor.dim() == 3 and "Expert" in kind:
        return "experts"
    if tensor.dim() == 2 and "Expert" in kind and getattr(module, "num_experts", 0) == len(tensor):
        return "vector"  # a bias of each expert
    beside = any(is_linear_module(child) for child in module.children())  # layers, as the decay of a state is
    of_no_layer = tensor.dim() == 2 and beside
    return "vector" if of_no_layer or sum(size > 1 for size in tensor.shape) <= 1 else "other"


def is_linear_module(module: Any) -> bool:
    """Whether libraries that replace Linear modules may take it: by its class, or by what the class is called.

    A model may have the word in its own name, as Kimi Linear has: KimiLinearTopkRouter is none.
    """
    import torch

    owner: Any = type(module)
    if isinstance(module, torch.nn.Linear) or owner.__name__ in ("Conv1D", "Linear"):
        return True
    wanted = OWN_LINEAR if owner.__module__.startswith(MODEL_CODE) else "Linear"
    return re.search(wanted, owner.__name__) is not None


@cache
def does_more(kind: Any) -> bool:
    """Whether a Linear class of a model's code does more than multiply: routers, grouped and compressing layers.

    One that changes only how it multiplies is made small, and asked.
    """
    import torch

    linear = torch.nn.Linear
    if not issubclass(kind, linear) or not kind.__module__.startswith(MODEL_CODE) or kind.forward is linear.forward:
        return False
    if kind.__init__ is not linear.__init__:
        return True
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        small, inputs = kind(3, 2), torch.ones(1, 3)
        return not torch.allclose(small(inputs), torch.nn.functional.linear(inputs, small.weight, small.bias))
