"""The embedding and the output head of a model in the packed layout, with what is tied to them. Imports torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from polyquant.errors import ConfigError
from polyquant.loaded import LoadedModel
from polyquant.memory.packed import scheme_of
from polyquant.models.versions import tied_tensors
from polyquant.modules import module_of
from polyquant.packed_weights.bands import Rows
from polyquant.packed_weights.half import HalfEmbedding, HalfLinear
from polyquant.packed_weights.linear import RepackedLinear
from polyquant.packed_weights.vocabulary import RepackedEmbedding, rounded, tied_head
from polyquant.packed_weights.weight import PackedWeight
from polyquant.plugin.dtypes import cast_dense
from polyquant.types import LayerPlan, WeightInfo


def is_vocabulary(plan: LayerPlan) -> bool:
    """Whether the core rounds it: the embedding, with a head that is tied to it, or the head."""
    return plan.packed is not None and plan.role in ("embedding", "head") and plan.scheme == scheme_of(plan.packed)


def pack_vocabulary(model: Any, plan: LayerPlan, rows: Rows | None = None, dtype: torch.dtype | None = None) -> None:
    """Round what `is_vocabulary`, where it has not been yet. Raises ConfigError for modules that do more.

    rows: of its weight, where the model does not have that; dtype: of these.
    """
    name = module_of(plan)
    if isinstance(model.get_submodule(name), (RepackedEmbedding, RepackedLinear)):  # while it was loaded
        return
    module = _that_does_no_more(model, name, plan.role)
    assert plan.packed is not None  # of what the core rounds
    weight = rounded(module.weight if rows is None else rows, plan.packed)
    if plan.role == "head":
        model.set_submodule(name, RepackedLinear(weight, module.bias, plan.scheme, plan.bits))
        return
    put_packed(model, plan, weight, module.weight.dtype if dtype is None else dtype)


def put_packed(model: Any, plan: LayerPlan, weight: PackedWeight, dtype: torch.dtype) -> None:
    """Put a packed table in the place of the embedding, and of a head that is tied to it. dtype: of what it answers."""
    name = module_of(plan)
    embedding = RepackedEmbedding(weight, dtype, plan.scheme, plan.bits, scale_of(model.get_submodule(name)))
    put_embedding(model, name, embedding, partial(tied_head, embedding))


def halve(loaded: LoadedModel, weight: WeightInfo) -> None:
    """Keep the embedding, with a head that is tied to it, or the head in 16 bits, dense.

    Raises ConfigError for modules that do more, ModelError for numbers that are too large.
    """
    assert loaded.request is not None
    name, model = module_of(weight), loaded.model
    module = _that_does_no_more(model, name, weight.role)
    narrow = cast_dense(loaded.request.source, weight.name, module.weight.detach(), getattr(torch, weight.dtype))
    half = torch.nn.Parameter(narrow, requires_grad=module.weight.requires_grad)
    if weight.role == "head":
        model.set_submodule(name, HalfLinear(half, module.bias))
        return
    embedding = HalfEmbedding(half, getattr(torch, loaded.config.compute_dtype), module.padding_idx, scale_of(module))
    put_embedding(model, name, embedding, partial(HalfLinear, half))


def _that_does_no_more(model: Any, name: str, role: str) -> Any:
    """The module of an embedding or a head, which looks up rows or multiplies. Raises ConfigError for another."""
    module = model.get_submodule(name)
    plain, option = (torch.nn.Linear, "head") if role == "head" else (torch.nn.Embedding, "embeddings")
    scale, longest = getattr(module, "embed_scale", None), getattr(module, "max_norm", None)
    if not isinstance(module, plain) or isinstance(scale, float) or longest is not None:
        raise ConfigError(f"{name} is {type(module).__name__}, and does more than {plain.__name__}: {option}='keep'")
    return module


def scale_of(embedding: Any) -> torch.Tensor | None:
    """Gemma's factor of an embedding."""
    return getattr(embedding, "embed_scale", None)


def put_embedding(model: Any, name: str, embedding: Any, head_of: Callable[[torch.Tensor | None], Any]) -> None:
    """Put an embedding in the place of a model's own, and in that of a head that is tied to it.

    head_of: a bias, or None -> the head.
    """
    tied = [each for each, origin in tied_tensors(model).items() if origin == f"{name}.weight"]
    model.set_submodule(name, embedding)
    for other in tied:
        head = other.rpartition(".")[0]
        model.set_submodule(head, head_of(getattr(model.get_submodule(head), "bias", None)))
