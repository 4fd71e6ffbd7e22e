"""Back from the packed runtime, for saving: the library's model, proven to hold the same weights. Imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from msgspec.structs import replace

from polyquant.errors import SaveError
from polyquant.loaded import LoadedModel
from polyquant.memory.adapted import base_name
from polyquant.memory.packed import VOCABULARY_SCHEMES, is_halved
from polyquant.packable import KEEP, QUANTIZE
from polyquant.packed_weights.experts import RepackedExperts
from polyquant.packed_weights.linear import RepackedLinear
from polyquant.packed_weights.vocabulary import RepackedEmbedding, rounded
from polyquant.packed_weights.weight import same
from polyquant.registry.repacked import Packing, is_stack, packed_stack, rounded_experts, with_stored_options


def as_its_own(loaded: LoadedModel, backend: Packing) -> LoadedModel:
    """The model as the backend's library has it: loaded again, and proven to hold the same packed weights.

    Dense tensors are those of `loaded`: what was changed there in memory is saved. Raises SaveError where packed ones
    are others, or it cannot be loaded again.
    """
    if loaded.request is None or loaded.settled is None:
        raise SaveError("it is not known where this model came from: load through polyquant.load")
    experts = _experts_of(loaded.model)
    ours = hasattr(loaded.settled.options, "experts")
    still = {"experts": QUANTIZE} if experts and ours else {}  # the core's, so that none is refused
    options = replace(loaded.settled.options, kernel="library", embeddings=KEEP, head=KEEP, **still)
    dtype = loaded.config.compute_dtype
    weights = tuple(
        replace(weight, dtype=dtype) if is_halved(weight, loaded.config) else weight
        for weight in loaded.settled.weights
    )
    request = replace(loaded.request, later=frozenset(), weights=weights)
    try:
        again = backend.load(request, replace(loaded.settled, options=options, weights=weights))
    except OSError as error:
        raise SaveError(
            f"a model with kernel='packed' is read again to be saved, and {loaded.request.source.name} cannot be read "
            f"any more: {error}"
        ) from error
    again.tokenizer = loaded.tokenizer
    with_stored_options(again)
    if experts:
        _require_same_experts(experts, loaded, again, backend)
    mine = {base_name(name): module for name, module in loaded.model.named_modules()
            if isinstance(module, (RepackedLinear, RepackedEmbedding))}  # fmt: skip
    for name, module in mine.items():
        now = again.model.get_submodule(name)
        ours = module.scheme in VOCABULARY_SCHEMES
        if not same(rounded(now.weight, module.format) if ours else backend.pack(now), module.packed):
            raise _changed(loaded, name)
    _take_dense(again.model, loaded.model)
    return again


def _take_dense(model: Any, other: Any) -> None:
    """Give a model the plain tensors of another one, where they were changed there, or 16 bits hold the same there."""
    theirs = {base_name(name): tensor for name, tensor in _plain_tensors(other)}
    for name, tensor in _plain_tensors(model):
        now = theirs.get(name)
        if now is None or now.shape != tensor.shape:
            continue
        narrow = tensor.detach().to(now.dtype)
        is_whole = torch.equal(narrow.to(tensor.dtype), tensor)
        if not torch.equal(now, narrow) or (is_whole and now.dtype != tensor.dtype):
            tensor.data = now.detach().clone()


def _plain_tensors(model: Any) -> Iterator[tuple[str, Any]]:
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
        if is_plain and tensor.is_floating_point() and tensor.itemsize > 1:  # no codes
            yield name, tensor


def _experts_of(model: Any) -> dict[str, RepackedExperts]:
    """The packed experts of a model by the names of the tensors that they stand for."""
    return {base_name(name): module for name, module in model.named_modules() if isinstance(module, RepackedExperts)}


def _require_same_experts(
    experts: Mapping[str, RepackedExperts], loaded: LoadedModel, again: LoadedModel, backend: Packing
) -> None:
    """Raises SaveError where experts of a model that was loaded again, dense, are not those that are packed."""
    assert loaded.settled is not None
    assert loaded.request is not None
    weights = {weight.name: weight for weight in loaded.settled.weights}
    plans = {plan.name: plan for plan in backend.plan_layers(loaded.settled.weights, loaded.config)}
    for name, mine in experts.items():
        if is_stack(again.model, name):
            now = packed_stack(again.model.get_submodule(name), plans[name], backend)
        else:
            now = rounded_experts(
                again.model.get_parameter(name).detach(), weights[name], plans[name], loaded.request.source,
                loaded.config, backend,
            )  # fmt: skip
        if not all(same(one, other) for one, other in zip(now, mine.packed, strict=True)):
            raise _changed(loaded, name)


def _changed(loaded: LoadedModel, name: str) -> SaveError:
    assert loaded.request is not None
    return SaveError(
        f"{loaded.request.source.name} has changed since it was loaded: {name} is another weight now; load it again, "
        "then save"
    )
