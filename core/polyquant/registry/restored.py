"""A packed model as records of its modules and its tensors by name, and the same model from them. Imports torch.

The twin of `repacked`: nothing is read of the dense checkpoint, and no library of a backend is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch

from polyquant.errors import ModelError
from polyquant.models.versions import tied_tensors
from polyquant.options import Dtype
from polyquant.packed_weights.experts import ExpertStack, RepackedExperts, put_in
from polyquant.packed_weights.half import HalfEmbedding, HalfLinear
from polyquant.packed_weights.linear import CODES, RepackedLinear
from polyquant.packed_weights.vocabulary import RepackedEmbedding, tied_head
from polyquant.packed_weights.weight import PackedWeight
from polyquant.plugin.layers import fill_empty
from polyquant.plugin.pretrained import empty_causal_lm
from polyquant.plugin.quantizer import forget_library
from polyquant.registry.vocabulary import put_embedding, scale_of
from polyquant.request import LoadRequest
from polyquant.types import PackedFormat, Record

Kind = Literal["linear", "embedding", "experts", "half embedding", "half linear"]


class StoredModule(Record, frozen=True):
    """A module that takes the place of a model's own, without its tensors."""

    name: str
    kind: Kind
    dtype: str = ""  # of what an embedding answers
    scheme: str = ""  # of packed ones, as the following
    bits: int | float = 0
    shape: tuple[int, int] = (0, 0)
    format: PackedFormat | None = None
    zero: float = 0.0
    transposed: bool = False  # of experts


def stored_modules(model: Any) -> list[StoredModule]:
    """The modules of a packed model that are not its class's own; those tied to an embedding come with it."""
    owners = {id(module.weight) for module in model.modules() if isinstance(module, HalfEmbedding)}
    found = [_stored(name, module) for name, module in model.named_modules()
             if not getattr(module, "is_tied", False)
             and not (isinstance(module, HalfLinear) and id(module.weight) in owners)]  # fmt: skip
    return [each for each in found if each is not None]


def stored_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Its parameters, and the buffers that a state dict has, each once."""
    tied = [name for name, module in model.named_modules() if getattr(module, "is_tied", False)]
    again = {f"{name}.{part}" for name in tied for part in model.get_submodule(name)._parameters if part != "bias"}
    buffers = {
        f"{prefix}.{name}".removeprefix("."): buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
    named = {**dict(model.named_parameters()), **buffers}
    return {name: tensor.detach() for name, tensor in named.items() if name not in again}


def restore(
    request: LoadRequest, dtype: Dtype, modules: Sequence[StoredModule], tensors: Mapping[str, torch.Tensor]
) -> Any:
    """The model of a request from its modules and tensors, which become the model's own.

    Raises ModelError for tensors that are not those of such a model.
    """
    model, left = empty_causal_lm(request, dtype), dict[str, torch.Tensor]()
    parts: dict[str, dict[str, torch.Tensor]] = {each.name: {} for each in modules}
    for name, tensor in tensors.items():
        owner, _, short = name.rpartition(".")
        if owner in parts:
            parts[owner][short] = tensor
        else:
            left[name] = tensor
    for each in modules:
        try:
            _put(model, each, parts[each.name])
        except (AttributeError, KeyError, TypeError) as error:
            raise ModelError(f"{each.name} cannot be put together: {type(error).__name__}: {error}") from error
    fill_empty(model, left, tied=tied_tensors(model))
    if not any(each.kind in ("embedding", "half embedding") for each in modules):
        model.tie_weights()
    model.config.dtype = getattr(torch, dtype)
    forget_library(model)
    return model


def _stored(name: str, module: Any) -> StoredModule | None:
    if isinstance(module, HalfEmbedding):
        return StoredModule(name=name, kind="half embedding", dtype=_name(module.dtype))
    if isinstance(module, HalfLinear):
        return StoredModule(name=name, kind="half linear")
    if not isinstance(module, (RepackedLinear, RepackedEmbedding, RepackedExperts)):
        return None
    kind: Kind = "linear"
    if isinstance(module, RepackedEmbedding):
        kind = "embedding"
    elif isinstance(module, RepackedExperts):
        kind = "experts"
    return StoredModule(
        name=name, kind=kind, scheme=module.scheme, bits=module.bits, shape=module.shape, format=module.format,
        zero=module.zero, dtype=_name(module.dtype) if kind == "embedding" else "",
        transposed=isinstance(module, ExpertStack) and module.transposed,
    )  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _put(model: Any, each: StoredModule, own: dict[str, torch.Tensor]) -> None:
    owner, _, name = each.name.rpartition(".")
    module: Any = getattr(model.get_submodule(owner), name)  # of experts the tensor
    if each.kind == "experts":
        weight = _weight(each, own)
        stack = RepackedExperts.of_parts(weight, each.scheme, each.bits, transposed=each.transposed)
        put_in(model.get_submodule(owner), name, stack)
    elif each.kind == "linear":
        bias = own.pop("bias", None)
        model.set_submodule(each.name, RepackedLinear(_weight(each, own), bias, each.scheme, each.bits))
    elif each.kind == "half linear":
        bias = own.get("bias")
        model.set_submodule(
            each.name, HalfLinear(_parameter(own["weight"]), None if bias is None else _parameter(bias))
        )
    elif each.kind == "half embedding":
        half = _parameter(own["weight"])
        embedding: Any = HalfEmbedding(half, getattr(torch, each.dtype), module.padding_idx, scale_of(module))
        put_embedding(model, each.name, embedding, partial(HalfLinear, half))
    else:
        dtype = getattr(torch, each.dtype)
        embedding = RepackedEmbedding(_weight(each, own), dtype, each.scheme, each.bits, scale_of(module))
        put_embedding(model, each.name, embedding, partial(tied_head, embedding))


def _parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor)


def _weight(each: StoredModule, own: Mapping[str, torch.Tensor]) -> PackedWeight:
    """Of experts each part has one more axis before the others."""
    assert each.format is not None
    parts = {"codes" if name == CODES else name: tensor for name, tensor in own.items()}
    return PackedWeight(shape=each.shape, format=each.format, zero=each.zero, **parts)
