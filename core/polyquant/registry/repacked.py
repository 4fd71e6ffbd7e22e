"""A loaded model in the packed runtime: its backend's modules replaced, one after the other, and back for saving."""

from __future__ import annotations

from typing import Any, Protocol

from msgspec.structs import replace

from polyquant.errors import BrokenBackend, SaveError
from polyquant.loaded import LoadedModel
from polyquant.memory.adapted import base_name
from polyquant.packed_weights import kernels, step
from polyquant.packed_weights.linear import RepackedLinear
from polyquant.packed_weights.weight import PackedWeight, same
from polyquant.plugin.quantizer import forget_library
from polyquant.types import LayerInfo, LayerPlan

SHOWN = 3  # names of layers in a note


class Packing(Protocol):
    """What is needed of a backend's handle."""

    name: str

    def describe_layers(self, model: Any) -> list[LayerInfo]: ...
    def plan_layers(self, weights: Any, config: Any) -> list[LayerPlan]: ...
    def pack(self, module: Any) -> Any: ...
    def load(self, request: Any, settled: Any) -> LoadedModel: ...


def repack(loaded: LoadedModel, backend: Packing) -> None:
    """Put each quantized module of a loaded model that was planned so into the packed layout.

    Raises BrokenBackend where the backend packs a weight otherwise than it plans.
    """
    assert loaded.settled is not None  # every load sets it
    plans = {plan.name: plan for plan in backend.plan_layers(loaded.settled.weights, loaded.config)}
    left = []
    for layer in [each for each in backend.describe_layers(loaded.model) if each.quantized]:
        plan = plans.get(layer.name)
        if plan is None or plan.packed is None:
            left.append(layer.name)
            continue
        name = layer.name.rpartition(".")[0]
        module = loaded.model.get_submodule(name)
        weight = _packed(module, plan, backend)
        bias = getattr(module, "bias", None)
        loaded.model.set_submodule(name, RepackedLinear(weight, bias, layer.scheme, layer.bits))
    forget_library(loaded.model)
    loaded.kernel = kernels.name()
    if left:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        loaded.notes.append(
            f"the library multiplies with {', '.join(left[:SHOWN])}{more}: they have no place in the packed layout"
        )
    if kernels.library() is None:
        loaded.notes.append(f"plain torch multiplies, slowly: pip install {kernels.DISTRIBUTION}")
    if step.attach(loaded.model):
        loaded.kernel += ", whole steps"


def _packed(module: Any, plan: LayerPlan, backend: Packing) -> PackedWeight:
    weight = backend.pack(module)
    if not isinstance(weight, PackedWeight):
        raise BrokenBackend(f"{backend.name}: pack answered with {type(weight).__name__}, and not with a PackedWeight")
    if (weight.shape, weight.format) != (plan.shape, plan.packed):
        raise BrokenBackend(
            f"{backend.name}: {plan.name} was planned as {plan.packed} {plan.shape}, and pack gave {weight.format} "
            f"{weight.shape}"
        )
    return weight


def as_its_own(loaded: LoadedModel, backend: Packing) -> LoadedModel:
    """The model as the backend's library has it: loaded again, and proven to hold the same weights.

    Raises SaveError where it does not, or cannot be loaded again.
    """
    if loaded.request is None or loaded.settled is None:
        raise SaveError("it is not known where this model came from: load through polyquant.load")
    options = replace(loaded.settled.options, kernel="library")
    try:
        again = backend.load(loaded.request, replace(loaded.settled, options=options))
    except OSError as error:
        raise SaveError(
            f"a model with kernel='packed' is read again to be saved, and {loaded.request.source.name} cannot be read "
            f"any more: {error}"
        ) from error
    again.tokenizer = loaded.tokenizer
    mine = {base_name(name): module for name, module in loaded.model.named_modules()
            if isinstance(module, RepackedLinear)}  # fmt: skip
    for name, module in mine.items():
        if not same(backend.pack(again.model.get_submodule(name)), module.packed):
            raise SaveError(
                f"{loaded.request.source.name} has changed since it was loaded: {name} is another weight now; load it "
                "again, then save"
            )
    return again
