"""Describes a model that PEFT has put adapters on: the base under its own names, the adapters as what they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from polyquant.models.roles import REASONS
from polyquant.types import LayerInfo

WRAPPERS = ("base_layer", "original_module", "token_adapter")  # PEFT's names of the module that an adapter wraps
TRAINED = ("modules_to_save", "trainable_tokens_delta", "trainable_tokens_original")  # and of what it adds,
MARK = "lora_"  # beside the tensors of LoRA and DoRA


def base_names(layers: Sequence[LayerInfo]) -> list[LayerInfo]:
    """`layers` of the wrapped model, with the names of the base; tensors of adapters have the role adapter."""
    return [
        msgspec.structs.replace(layer, role="adapter", reason=REASONS["adapter"])
        if is_adapters(layer.name)
        else msgspec.structs.replace(layer, name=base_name(layer.name))
        for layer in layers
    ]


def base_name(name: str) -> str:
    """The name that a module or tensor of the base has without PEFT's wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def is_adapters(name: str) -> bool:
    """Whether the tensor is part of an adapter."""
    return any(part in TRAINED or part.startswith(MARK) for part in name.split("."))


def unwrapped(module: Any) -> Any:
    """The module of the base that PEFT's wrappers, one in the other, go around."""
    while inner := {name: part for name, part in getattr(module, "_modules", {}).items() if part is not None}:
        wrapped = next((inner[name] for name in WRAPPERS if name in inner), None)
        if wrapped is None:
            break
        module = wrapped
    return module
