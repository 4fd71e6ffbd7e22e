"""The layers of a candidate, one by one: bits, bytes, and how far their weights are from the dense model's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from safetensors import safe_open

from polyquant.comparison.records import Layer
from polyquant.loaded import LoadedModel
from polyquant.loading.records import DENSE_ROLES
from polyquant.memory.effective import effective_weight
from polyquant.models.resolve import resolve_dense
from polyquant.types import LayerInfo

COLUMNS = 64  # of each weight that are compared: input features drawn once, the same for every candidate


def layers_of(loaded: LoadedModel, dense: str) -> tuple[Layer, ...]:
    """Every weight matrix of `loaded`; dense: the model to hold its weights against, empty for none."""
    matrices = [layer for layer in loaded.initial_layers if layer.role not in ("vector", "buffer", "adapter")]
    errors = dict(_errors(loaded, matrices, dense)) if dense and loaded.backend.capabilities.runs_on_torch else {}
    return tuple(
        Layer(
            name=layer.name, shape=layer.shape, bits=layer.bits, scheme=layer.scheme, stored_bytes=layer.stored_bytes,
            quantized=layer.quantized, relative_error=errors.get(layer.name),
        )
        for layer in matrices
    )  # fmt: skip


def _errors(loaded: LoadedModel, layers: list[LayerInfo], dense: str) -> Iterator[tuple[str, float]]:
    """Relative error of each quantized linear layer, from what it computes with."""
    dtype = getattr(torch, loaded.config.compute_dtype)
    with ExitStack() as files:
        source = resolve_dense(dense)
        opened = [files.enter_context(safe_open(source.path / name, "pt")) for name in source.weight_files]
        owner = {name: file for file in opened for name in file.keys()}  # noqa: SIM118  a handle, no dict
        for layer in layers:
            if layer.quantized and layer.role not in DENSE_ROLES and len(layer.shape) == 2 and layer.name in owner:
                columns = _columns(layer.shape[1])
                module = loaded.model.get_submodule(layer.name.rpartition(".")[0])
                found = effective_weight(module, layer.shape[1], columns, dtype)
                wanted = _read(owner[layer.name], layer.name)[:, columns]
                yield layer.name, float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))


def _columns(in_features: int) -> list[int]:
    return sorted(random.Random(0).sample(range(in_features), min(COLUMNS, in_features)))  # noqa: S311  no secret


def _read(file: Any, name: str) -> Any:
    return file.get_tensor(name).float()
