"""A loaded model in the packed runtime: modules replaced, one after the other, and back for saving. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from msgspec.structs import replace

from polyquant.errors import BrokenBackend, ConfigError, ModelError, SaveError
from polyquant.loaded import LoadedModel
from polyquant.memory.adapted import base_name
from polyquant.memory.packed import VOCABULARY_SCHEMES, scheme_of
from polyquant.models.versions import tied_tensors
from polyquant.options import KEEP, is_packed, packs_any
from polyquant.packed_weights import kernels, step
from polyquant.packed_weights.linear import RepackedLinear
from polyquant.packed_weights.vocabulary import RepackedEmbedding, rounded, tied_head
from polyquant.packed_weights.weight import PackedWeight, same
from polyquant.plugin.quantizer import forget_library
from polyquant.types import LayerInfo, LayerPlan, PackedFormat

SHOWN = 3  # names of layers in a note


class Packing(Protocol):
    """What is needed of a backend's handle."""

    name: str

    def describe_layers(self, model: Any) -> list[LayerInfo]: ...
    def plan_layers(self, weights: Any, config: Any) -> list[LayerPlan]: ...
    def pack(self, module: Any) -> Any: ...
    def load(self, request: Any, settled: Any) -> LoadedModel: ...


def finish(loaded: LoadedModel, backend: Packing) -> None:
    """What a backend's `load` gave, with the options that a checkpoint stores, and packed where it is to be."""
    if getattr(loaded.model.config, "quantization_config", None) is None:
        loaded.model.config.quantization_config = loaded.config.to_stored()
    if packs_any(loaded.config):
        repack(loaded, backend)


def repack(loaded: LoadedModel, backend: Packing) -> None:
    """Put what was planned so of a loaded model into the packed layout: quantized modules, embedding, head.

    Raises BrokenBackend where the backend packs a weight otherwise than it plans, ModelError where a weight's values
    have no place there.
    """
    assert loaded.settled is not None  # every load sets it
    weights = loaded.settled.weights
    plans = {plan.name: plan for plan in backend.plan_layers(weights, loaded.config)}
    if is_packed(loaded.config):
        _pack_quantized(loaded, plans, {weight.name: weight.as_linear for weight in weights}, backend)
        forget_library(loaded.model)
        loaded.kernel = kernels.name()
    for plan in plans.values():
        if plan.packed is not None and plan.role in ("embedding", "head") and plan.scheme == scheme_of(plan.packed):
            _pack_vocabulary(loaded.model, plan, plan.packed)
    if kernels.library() is None:
        loaded.notes.append(f"plain torch multiplies, slowly: {kernels.INSTALL}")
    if is_packed(loaded.config) and step.attach(loaded.model):
        loaded.kernel += ", whole steps"


def _pack_quantized(
    loaded: LoadedModel, plans: Mapping[str, LayerPlan], shapes: Mapping[str, tuple[int, ...]], backend: Packing
) -> None:
    """Replace the modules that the backend has quantized; those that have no place in the layout stay, with a note.

    shapes: (out_features, in_features) of each.
    """
    left = []
    for layer in [each for each in backend.describe_layers(loaded.model) if each.quantized]:
        plan = plans.get(layer.name)
        if plan is None or plan.packed is None:
            left.append(layer.name)
            continue
        name = layer.name.rpartition(".")[0]
        module = loaded.model.get_submodule(name)
        weight = _packed(module, plan, shapes[layer.name], backend)
        bias = getattr(module, "bias", None)
        loaded.model.set_submodule(name, RepackedLinear(weight, bias, layer.scheme, layer.bits))
    if left:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        loaded.notes.append(
            f"the library multiplies with {', '.join(left[:SHOWN])}{more}: they have no place in the packed layout"
        )


def left_with_library(model: Any, backend: Packing) -> bool:
    """Whether the library multiplies with any layer of a packed model: only its backend knows how that one trains."""
    quantized = {layer.name.rpartition(".")[0] for layer in backend.describe_layers(model) if layer.quantized}
    return any(not isinstance(model.get_submodule(name), (RepackedLinear, RepackedEmbedding)) for name in quantized)


def _pack_vocabulary(model: Any, plan: LayerPlan, layout: PackedFormat) -> None:
    """Round the embedding, with a head that is tied to it, or the head. Raises ConfigError for modules that do more."""
    name = plan.name.rpartition(".")[0]
    module = model.get_submodule(name)
    if plan.role == "head":
        if not isinstance(module, torch.nn.Linear):
            raise ConfigError(f"{name} is {type(module).__name__}, and no plain Linear: leave head out")
        weight = rounded(module.weight, layout)
        model.set_submodule(name, RepackedLinear(weight, module.bias, plan.scheme, plan.bits))
        return
    scale = getattr(module, "embed_scale", None)
    if not isinstance(module, torch.nn.Embedding) or isinstance(scale, float) or module.max_norm is not None:
        raise ConfigError(f"{name} is {type(module).__name__}, and does more than look up rows: leave embeddings out")
    weight = rounded(module.weight, layout)
    tied = [each for each, origin in tied_tensors(model).items() if origin == plan.name]
    embedding = RepackedEmbedding(weight, module.weight.dtype, plan.scheme, plan.bits, scale)
    model.set_submodule(name, embedding)
    for other in tied:
        head = other.rpartition(".")[0]
        model.set_submodule(head, tied_head(embedding, getattr(model.get_submodule(head), "bias", None)))


def _packed(module: Any, plan: LayerPlan, shape: tuple[int, ...], backend: Packing) -> PackedWeight:
    try:
        weight = backend.pack(module)
    except ModelError as error:
        raise ModelError(f"{plan.name} has no place in the packed layout: {error}; take kernel='library'") from error
    if not isinstance(weight, PackedWeight):
        raise BrokenBackend(f"{backend.name}: pack answered with {type(weight).__name__}, and not with a PackedWeight")
    if (weight.shape, weight.format) != (shape, plan.packed):
        raise BrokenBackend(
            f"{backend.name}: {plan.name} was planned as {plan.packed} {shape}, and pack gave {weight.format} "
            f"{weight.shape}"
        )
    return weight


def as_its_own(loaded: LoadedModel, backend: Packing) -> LoadedModel:
    """The model as the backend's library has it: loaded again, and proven to hold the same weights.

    Raises SaveError where it does not, or cannot be loaded again.
    """
    if loaded.request is None or loaded.settled is None:
        raise SaveError("it is not known where this model came from: load through polyquant.load")
    options = replace(loaded.settled.options, kernel="library", embeddings=KEEP, head=KEEP)
    try:
        again = backend.load(loaded.request, replace(loaded.settled, options=options))
    except OSError as error:
        raise SaveError(
            f"a model with kernel='packed' is read again to be saved, and {loaded.request.source.name} cannot be read "
            f"any more: {error}"
        ) from error
    again.tokenizer = loaded.tokenizer
    finish(again, backend)
    mine = {base_name(name): module for name, module in loaded.model.named_modules()
            if isinstance(module, (RepackedLinear, RepackedEmbedding))}  # fmt: skip
    for name, module in mine.items():
        now = again.model.get_submodule(name)
        ours = module.scheme in VOCABULARY_SCHEMES
        if not same(rounded(now.weight, module.format) if ours else backend.pack(now), module.packed):
            raise SaveError(
                f"{loaded.request.source.name} has changed since it was loaded: {name} is another weight now; load it "
                "again, then save"
            )
    return again
