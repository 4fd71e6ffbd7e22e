"""A model's own layers with random weights, packed as a plan has them: what is run to foresee its speed. Imports torch.

Nothing of the model but its config is needed. As many layers are made as go beyond a processor's caches; where the
model has more, the rest are the difference of two depths.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from math import ceil
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM

from polyquant.errors import UnsupportedOperation
from polyquant.measure.speed import Speed, measure_speed
from polyquant.models import generation, versions
from polyquant.packed_weights import step
from polyquant.packed_weights.chance import DEVIATION, random_weight
from polyquant.packed_weights.half import HalfEmbedding, HalfLinear
from polyquant.packed_weights.linear import RepackedLinear
from polyquant.packed_weights.vocabulary import RepackedEmbedding, tied_head
from polyquant.planning.devices import free_bytes
from polyquant.registry.vocabulary import put_embedding, scale_of
from polyquant.support.sizes import size
from polyquant.types import LayerPlan

COLD_BYTES = 2**28
"""Layers of so many bytes together, and half of them, leave a processor's caches before their next token."""
PROMPT_BYTES = 2**26
"""Of the layers whose prompts are timed: these wait for the processor, and not for memory."""
PROMPT_TOKENS, GENERATED_TOKENS = 512, 32
HALVES = ("float16", "bfloat16")
SECONDS = 0.5  # in which prompts, and generations, are repeated


class StandIn:
    """Layers of a model, timed at different depths."""

    def __init__(self, config: Any, plans: Mapping[str, LayerPlan], *, trust_remote_code: bool) -> None:
        """config: transformers'. plans: of its tensors by their names. Raises UnsupportedOperation with the reason."""
        self._config = config = copy.deepcopy(config)
        if config.get_text_config() is not config:
            raise UnsupportedOperation("the model has parts beside its language model")
        self.depth: int = config.num_hidden_layers
        kinds = [*(getattr(config, "layer_types", None) or ["layer"] * self.depth)]
        self._kinds, self._period = kinds, 1 + max(kinds.index(kind) for kind in set(kinds))
        self._cut(self._period)
        with init_empty_weights(include_buffers=False):
            self._model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, **versions.dtype_argument(torch.float32)
            ).eval()
        _fill(self._model, plans)
        decoder = self._model.get_decoder()
        self._layers = list(getattr(decoder, "layers", ()))
        if len(self._layers) != self._period:
            raise UnsupportedOperation("the model's decoder has no list of layers")
        self._each = sum(parameter.nbytes for parameter in decoder.layers.parameters()) // self._period
        self._most = self._layers_of(COLD_BYTES)
        room = free_bytes("cpu") // 2
        if room < self._most * self._each:
            raise UnsupportedOperation(
                f"it takes {size(self._most * self._each)}, and {size(room)} is half of what is free"
            )
        self._layers += [self._copy(number) for number in range(self._period, self._most)]

    def token_seconds(self) -> float:
        """Of one generated token."""

        def seconds(layers: int) -> float:
            return 1 / max(self._speed(layers, 1, GENERATED_TOKENS).generated_tokens_per_second.repetitions)

        return self._of_all(self._most, self._most // 2, seconds)

    def prompt_seconds(self) -> float:
        """Of a prompt of PROMPT_TOKENS."""

        def seconds(layers: int) -> float:
            return PROMPT_TOKENS / max(self._speed(layers, PROMPT_TOKENS, 1).prompt_tokens_per_second.repetitions)

        return self._of_all(self._layers_of(PROMPT_BYTES), self._period, seconds)

    def _layers_of(self, nbytes: int) -> int:
        """Layers of so many bytes together; at least two of each kind, where the model has so many."""
        wanted: int = max(2 * self._period, ceil(nbytes / self._each))
        return min(self.depth, wanted)

    def _of_all(self, deep: int, shallow: int, seconds: Callable[[int], float]) -> float:
        """What `deep` layers take, and as much for each of the others as those took that `shallow` ones do without."""
        most = seconds(deep)
        if deep == self.depth:
            return most
        return most + (self.depth - deep) * max(0.0, most - seconds(shallow)) / (deep - shallow)

    def _speed(self, layers: int, prompt: int, generated: int) -> Speed:
        self._put(layers)
        return measure_speed(
            partial(generation.session, self._model), self._model.config.vocab_size, prompt_tokens=prompt,
            generated_tokens=generated, repetitions=3, limit_seconds=SECONDS,
        )  # fmt: skip

    def _put(self, layers: int) -> None:
        """Have the model consist of the first so many layers."""
        self._cut(layers)
        decoder = self._model.get_decoder()
        decoder.__dict__.pop("forward", None)
        decoder.layers = nn.ModuleList(self._layers[:layers])
        step.attach(self._model)

    def _cut(self, layers: int) -> None:
        self._config.num_hidden_layers = layers
        if getattr(self._config, "layer_types", None):
            self._config.layer_types = self._kinds[:layers]

    def _copy(self, number: int) -> nn.Module:
        layer: nn.Module = copy.deepcopy(self._layers[number % self._period])
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
        return layer


def _fill(model: Any, plans: Mapping[str, LayerPlan]) -> None:
    """Random weights in the place of empty ones."""
    for name, module in list(model.named_modules()):
        plan = plans.get(f"{name}.weight")
        if isinstance(module, nn.Embedding) and plan is not None and plan.role == "embedding":
            _put_embedding(model, name, module, plan)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.weight.is_meta:
            model.set_submodule(name, _linear(module, plans.get(f"{name}.weight")))
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            continue
        if parameter.dim() > 1:
            raise UnsupportedOperation(f"{name} {tuple(parameter.shape)} is no matrix of a linear layer")
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, nn.Parameter(torch.ones(parameter.shape), requires_grad=False))


def _linear(module: nn.Linear, plan: LayerPlan | None) -> nn.Module:
    shape = (module.out_features, module.in_features)
    bias = None if module.bias is None else torch.zeros(module.out_features)
    if plan is not None and plan.packed is not None:
        return RepackedLinear(random_weight(shape, plan.packed), bias, plan.scheme, plan.bits)
    if plan is not None and plan.scheme in HALVES:
        return HalfLinear(_dense(shape, plan.scheme), None if bias is None else nn.Parameter(bias))
    dense = nn.Linear(*shape[::-1], bias=bias is not None)
    return dense.requires_grad_(False)


def _put_embedding(model: Any, name: str, module: nn.Embedding, plan: LayerPlan) -> None:
    shape = (module.num_embeddings, module.embedding_dim)
    if plan.packed is not None:
        weight = random_weight(shape, plan.packed)
        packed = RepackedEmbedding(weight, torch.float32, plan.scheme, plan.bits, scale_of(module))
        put_embedding(model, name, packed, partial(tied_head, packed))
        return
    table = _dense(shape, plan.scheme if plan.scheme in HALVES else "float32")
    embedding = HalfEmbedding(table, torch.float32, module.padding_idx, scale_of(module))
    put_embedding(model, name, embedding, partial(HalfLinear, table))


def _dense(shape: tuple[int, int], dtype: str) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=getattr(torch, dtype)) * DEVIATION, requires_grad=False)
