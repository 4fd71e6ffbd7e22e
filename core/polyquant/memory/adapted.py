"""Describes a model that PEFT has put adapters on: the base under its own names, the adapters as what they are."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from polyquant.models.roles import REASONS
from polyquant.types import LayerInfo

BASE_LAYER = "base_layer"  # PEFT's name of the module that an adapter wraps
MARK = ".lora_"  # in the names of LoRA's and DoRA's tensors


def base_names(layers: Sequence[LayerInfo]) -> list[LayerInfo]:
    """`layers` of the wrapped model, with the names of the base; tensors of adapters have the role adapter."""
    return [_adapter(layer) if MARK in layer.name else _base(layer) for layer in layers]


def _base(layer: LayerInfo) -> LayerInfo:
    return msgspec.structs.replace(layer, name=layer.name.replace(f".{BASE_LAYER}.", "."))


def _adapter(layer: LayerInfo) -> LayerInfo:
    return msgspec.structs.replace(layer, role="adapter", reason=REASONS["adapter"])
