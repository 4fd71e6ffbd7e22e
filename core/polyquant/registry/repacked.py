"""A loaded model in the packed runtime: its modules are replaced, one after the other. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import torch
from tqdm import tqdm

from polyquant.errors import BrokenBackend, ModelError
from polyquant.loaded import LoadedModel
from polyquant.memory.experts import left_dense, one_expert
from polyquant.memory.on_disk import block_of
from polyquant.memory.packed import is_halved
from polyquant.modules import module_of
from polyquant.packable import is_packed, packs_any
from polyquant.packed_weights import kernels, step
from polyquant.packed_weights.bands import Rows
from polyquant.packed_weights.experts import ExpertStack, LinearExperts, RepackedExperts, put_in
from polyquant.packed_weights.linear import RepackedLinear
from polyquant.packed_weights.tensor_file import TensorWriter
from polyquant.packed_weights.vocabulary import RepackedEmbedding
from polyquant.packed_weights.weight import PackedWeight
from polyquant.plugin import stream
from polyquant.plugin.dtypes import cast_dense
from polyquant.plugin.parts import is_finite
from polyquant.plugin.quantizer import forget_library
from polyquant.registry import vocabulary
from polyquant.request import LoadRequest, ModelSource
from polyquant.types import LayerInfo, LayerPlan, WeightInfo

if TYPE_CHECKING:
    from polyquant.loading.settle import Settled

SHOWN = 3  # names of layers in a note
_put_away: ContextVar[Callable[[str, Any], None] | None] = ContextVar("put_away", default=None)
LEFT_DENSE = (
    "fused experts stay dense: kernel='packed' quantizes them, or experts='quantize' beside the library's kernel; "
    "experts='keep' leaves this note out"
)


class Packing(Protocol):
    """What is needed of a backend's handle."""

    name: str

    def describe_layers(self, model: Any) -> list[LayerInfo]: ...
    def plan_layers(self, weights: Any, config: Any) -> list[LayerPlan]: ...
    def pack(self, module: Any) -> Any: ...
    def quantize_linear(self, linear: Any, config: Any) -> Any: ...
    def load(self, request: Any, settled: Any) -> LoadedModel: ...


@contextmanager
def putting_away(writer: TensorWriter) -> Iterator[None]:
    """Within it, each module of a model's blocks is in the writer's file as soon as it is packed, and no longer in
    memory."""

    def put_away(name: str, module: Any) -> None:
        if block_of(name):
            writer.put_away(name, module)

    token = _put_away.set(put_away)
    try:
        yield
    finally:
        _put_away.reset(token)


def _packed_now(name: str, module: Any) -> None:
    """To be called for each module that was packed; see `putting_away`."""
    if (put_away := _put_away.get()) is not None:
        put_away(name, module)


@contextmanager
def at_once(backend: Packing, request: LoadRequest, settled: Settled) -> Iterator[None]:
    """Within it, a load that goes layer by layer has each packed when the backend has quantized it, experts too,
    and an embedding or a head that the core rounds as it is read."""
    config = settled.options
    if settled.route == "as stored" or not packs_any(config):
        yield
        return
    weights = {weight.name: weight for weight in settled.weights}
    plans = {plan.name: plan for plan in backend.plan_layers(settled.weights, config)}

    def pack(model: Any, name: str) -> None:
        plan = plans.get(name) or plans.get(f"{name}.weight")
        if plan is None or plan.packed is None:
            return
        weight = weights[plan.name]
        if plan.role == "experts" and not is_stack(model, plan.name):
            _pack_experts(model, weight, plan, request.source, config, backend)
        elif is_packed(config):
            _pack_one(model, plan, weight.as_linear, config, backend)

    tables = {plan.name: partial(_pack_table, plan) for plan in plans.values() if vocabulary.is_vocabulary(plan)}
    with stream.packing(pack, tables):
        yield


def _pack_table(plan: LayerPlan, model: Any, rows: Rows, dtype: torch.dtype) -> None:
    vocabulary.pack_vocabulary(model, plan, rows, dtype)


def finish(loaded: LoadedModel, backend: Packing) -> None:
    """What a backend's `load` gave, with the options that a checkpoint stores, and packed where it is to be."""
    with_stored_options(loaded)
    if packs_any(loaded.config):
        repack(loaded, backend)
    if (
        loaded.settled is not None
        and loaded.settled.device == "cpu"
        and left_dense(loaded.settled.weights, loaded.config)
    ):
        loaded.notes.append(LEFT_DENSE)


def with_stored_options(loaded: LoadedModel) -> None:
    if getattr(loaded.model.config, "quantization_config", None) is None:
        loaded.model.config.quantization_config = loaded.config.to_stored()


def repack(loaded: LoadedModel, backend: Packing) -> None:
    """Put what was planned so of a loaded model into the packed layout: quantized modules, experts, embedding, head.

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
    dense = [plan for plan in plans.values() if plan.role == "experts" and plan.packed
             and not is_stack(loaded.model, plan.name)]  # fmt: skip
    quiet, named = not dense or loaded.request is None or not loaded.request.progress, {w.name: w for w in weights}
    for plan in tqdm(dense, desc="Quantizing experts", unit="tensor", disable=quiet):
        assert loaded.request is not None
        _pack_experts(loaded.model, named[plan.name], plan, loaded.request.source, loaded.config, backend)
    for plan in plans.values():
        if vocabulary.is_vocabulary(plan):
            vocabulary.pack_vocabulary(loaded.model, plan)
    for weight in weights:
        if is_halved(weight, loaded.config) and not weight.tied_to:
            vocabulary.halve(loaded, weight)
    if kernels.library() is None:
        loaded.notes.append(f"plain torch multiplies, slowly: {kernels.INSTALL}")
    is_whole = loaded.request is None or not loaded.request.on_disk
    if is_packed(loaded.config) and is_whole and step.attach(loaded.model):
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
        as_described = msgspec.structs.replace(plan, scheme=layer.scheme, bits=layer.bits)
        _pack_one(loaded.model, as_described, shapes[layer.name], loaded.config, backend)
    if left:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        loaded.notes.append(
            f"the library multiplies with {', '.join(left[:SHOWN])}{more}: they have no place in the packed layout"
        )


def _pack_one(model: Any, plan: LayerPlan, shape: tuple[int, ...], config: Any, backend: Packing) -> None:
    """Put what the backend has quantized into the packed layout, where it is not yet: experts, an embedding, a layer.

    shape: (out_features, in_features), or of the dense tensor of experts.
    """
    if plan.role == "experts":
        if not isinstance(stream.named(model, plan.name), RepackedExperts):
            _pack_stack(model, plan, shape, backend)
        return
    name = module_of(plan)
    module = model.get_submodule(name)
    if isinstance(module, (RepackedLinear, RepackedEmbedding)):  # while it was loaded
        return
    weight = _packed(module, plan, shape, backend)
    if plan.role == "embedding":
        vocabulary.put_packed(model, plan, weight, getattr(torch, config.compute_dtype))
    else:
        layer = RepackedLinear(weight, getattr(module, "bias", None), plan.scheme, plan.bits)
        model.set_submodule(name, layer)
        _packed_now(name, layer)
    module._parameters.clear()  # libraries' tensors and modules know each other: they would stay until a collection


def is_stack(model: Any, name: str) -> bool:
    """Whether experts, by the name of their tensor, are packed already: by their backend, or here."""
    owner, _, short = name.rpartition(".")
    return isinstance(getattr(model.get_submodule(owner), short), ExpertStack)


def _pack_stack(model: Any, plan: LayerPlan, shape: tuple[int, ...], backend: Packing) -> None:
    """Put experts that the backend has packed into the packed layout. shape: of their dense tensor."""
    owner, _, name = plan.name.rpartition(".")
    module = model.get_submodule(owner)
    stack = getattr(module, name)
    if not isinstance(stack, LinearExperts):
        raise BrokenBackend(f"{backend.name}: {plan.name} is {type(stack).__name__}, and not a LinearExperts")
    each = packed_stack(stack, plan, backend)
    _put_experts(module, plan, RepackedExperts(each, shape[0], plan.scheme, plan.bits, transposed=stack.transposed))


def packed_stack(stack: LinearExperts, plan: LayerPlan, backend: Packing) -> Iterator[PackedWeight]:
    """Each expert of a stack, as the backend packs its linear layers."""
    return (_packed(stack.expert(number), plan, stack.shape, backend) for number in range(stack.count))


def _pack_experts(
    model: Any, weight: WeightInfo, plan: LayerPlan, source: ModelSource, config: Any, backend: Packing
) -> None:
    """Round the dense experts of a layer as the backend rounds linear layers. Raises ModelError for NaN, infinity."""
    owner, _, name = plan.name.rpartition(".")
    module, transposed = model.get_submodule(owner), weight.stacked == "in_out"
    each = rounded_experts(getattr(module, name).detach(), weight, plan, source, config, backend)
    _put_experts(module, plan, RepackedExperts(each, plan.shape[0], plan.scheme, plan.bits, transposed=transposed))


def _put_experts(module: Any, plan: LayerPlan, stack: RepackedExperts) -> None:
    put_in(module, plan.name.rpartition(".")[2], stack)
    _packed_now(plan.name, stack)


def rounded_experts(
    whole: torch.Tensor, weight: WeightInfo, plan: LayerPlan, source: ModelSource, config: Any, backend: Packing
) -> Iterator[PackedWeight]:
    """Each expert of a dense tensor, as the backend rounds a linear layer with that weight in the compute dtype."""
    shape, dtype = one_expert(weight).shape, getattr(torch, weight.dtype)
    for number, matrix in enumerate(whole):
        if not is_finite(matrix):
            raise ModelError(f"{plan.name}: expert {number} holds NaN or infinity; the checkpoint is damaged")
        rows = cast_dense(source, plan.name, matrix.T if weight.stacked == "in_out" else matrix, dtype).contiguous()
        linear = torch.nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
        linear.weight = torch.nn.Parameter(rows, requires_grad=False)
        yield _packed(backend.quantize_linear(linear, config), plan, shape, backend)


def left_with_library(model: Any, backend: Packing) -> bool:
    """Whether the library multiplies with any layer of a packed model: only its backend knows how that one trains."""
    quantized = {module_of(layer) for layer in backend.describe_layers(model) if layer.quantized}
    modules = (model.get_submodule(name) for name in quantized)
    ours = (RepackedLinear, RepackedEmbedding)
    return any(
        not isinstance(each, ours) and not any(isinstance(child, RepackedExperts) for child in each.children())
        for each in modules
    )


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
