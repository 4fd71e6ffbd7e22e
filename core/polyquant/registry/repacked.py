"""A loaded model in the packed runtime: its modules are replaced, one after the other. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from tqdm import tqdm

from polyquant.errors import BrokenBackend, ConfigError, ModelError
from polyquant.loaded import LoadedModel
from polyquant.memory.experts import left_dense, one_expert
from polyquant.memory.packed import is_halved, scheme_of
from polyquant.models.versions import tied_tensors
from polyquant.modules import module_of
from polyquant.packable import is_packed, packs_any
from polyquant.packed_weights import kernels, step
from polyquant.packed_weights.experts import ExpertStack, LinearExperts, RepackedExperts, put_in
from polyquant.packed_weights.half import HalfEmbedding, HalfLinear
from polyquant.packed_weights.linear import RepackedLinear
from polyquant.packed_weights.vocabulary import RepackedEmbedding, rounded, tied_head
from polyquant.packed_weights.weight import PackedWeight
from polyquant.plugin.dtypes import cast_dense
from polyquant.plugin.quantizer import forget_library
from polyquant.types import LayerInfo, LayerPlan, PackedFormat, WeightInfo

SHOWN = 3  # names of layers in a note
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
    _pack_experts(loaded, dense, backend)
    for plan in plans.values():
        if plan.packed is not None and plan.role in ("embedding", "head") and plan.scheme == scheme_of(plan.packed):
            _pack_vocabulary(loaded.model, plan, plan.packed)
    for weight in weights:
        if is_halved(weight, loaded.config) and not weight.tied_to:
            _halve(loaded, weight)
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
        if plan.role == "experts":
            _pack_stack(loaded.model, plan, shapes[layer.name], backend)
            continue
        name = module_of(layer)
        module = loaded.model.get_submodule(name)
        weight = _packed(module, plan, shapes[layer.name], backend)
        if plan.role == "embedding":
            dtype = getattr(torch, loaded.config.compute_dtype)
            embedding = RepackedEmbedding(weight, dtype, layer.scheme, layer.bits, scale_of(module))
            put_embedding(loaded.model, name, embedding, partial(tied_head, embedding))
            continue
        bias = getattr(module, "bias", None)
        loaded.model.set_submodule(name, RepackedLinear(weight, bias, layer.scheme, layer.bits))
    if left:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        loaded.notes.append(
            f"the library multiplies with {', '.join(left[:SHOWN])}{more}: they have no place in the packed layout"
        )


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
    put_in(module, name, RepackedExperts(each, shape[0], plan.scheme, plan.bits, transposed=stack.transposed))


def packed_stack(stack: LinearExperts, plan: LayerPlan, backend: Packing) -> Iterator[PackedWeight]:
    """Each expert of a stack, as the backend packs its linear layers."""
    return (_packed(stack.expert(number), plan, stack.shape, backend) for number in range(stack.count))


def _pack_experts(loaded: LoadedModel, plans: list[LayerPlan], backend: Packing) -> None:
    """Round the experts of each layer as the backend rounds linear layers. Raises ModelError for NaN or infinity."""
    assert loaded.settled is not None  # every load sets it
    weights = {weight.name: weight for weight in loaded.settled.weights}
    quiet = not plans or loaded.request is None or not loaded.request.progress
    for plan in tqdm(plans, desc="Quantizing experts", unit="tensor", disable=quiet):
        owner, _, name = plan.name.rpartition(".")
        module = loaded.model.get_submodule(owner)
        each = rounded_experts(getattr(module, name).detach(), weights[plan.name], plan, loaded, backend)
        transposed = weights[plan.name].stacked == "in_out"
        put_in(module, name, RepackedExperts(each, plan.shape[0], plan.scheme, plan.bits, transposed=transposed))


def rounded_experts(
    whole: torch.Tensor, weight: WeightInfo, plan: LayerPlan, loaded: LoadedModel, backend: Packing
) -> Iterator[PackedWeight]:
    """Each expert of a dense tensor, as the backend rounds a linear layer with that weight in the compute dtype."""
    assert loaded.request is not None
    source = loaded.request.source
    shape, dtype = one_expert(weight).shape, getattr(torch, weight.dtype)
    for number, matrix in enumerate(whole):
        if not bool(torch.isfinite(matrix).all()):
            raise ModelError(f"{plan.name}: expert {number} holds NaN or infinity; the checkpoint is damaged")
        rows = cast_dense(source, plan.name, matrix.T if weight.stacked == "in_out" else matrix, dtype).contiguous()
        linear = torch.nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
        linear.weight = torch.nn.Parameter(rows, requires_grad=False)
        yield _packed(backend.quantize_linear(linear, loaded.config), plan, shape, backend)


def left_with_library(model: Any, backend: Packing) -> bool:
    """Whether the library multiplies with any layer of a packed model: only its backend knows how that one trains."""
    quantized = {module_of(layer) for layer in backend.describe_layers(model) if layer.quantized}
    modules = (model.get_submodule(name) for name in quantized)
    ours = (RepackedLinear, RepackedEmbedding)
    return any(
        not isinstance(each, ours) and not any(isinstance(child, RepackedExperts) for child in each.children())
        for each in modules
    )


def _pack_vocabulary(model: Any, plan: LayerPlan, layout: PackedFormat) -> None:
    """Round the embedding, with a head that is tied to it, or the head. Raises ConfigError for modules that do more."""
    name = module_of(plan)
    module = _that_does_no_more(model, name, plan.role)
    weight = rounded(module.weight, layout)
    if plan.role == "head":
        model.set_submodule(name, RepackedLinear(weight, module.bias, plan.scheme, plan.bits))
        return
    embedding = RepackedEmbedding(weight, module.weight.dtype, plan.scheme, plan.bits, scale_of(module))
    put_embedding(model, name, embedding, partial(tied_head, embedding))


def _halve(loaded: LoadedModel, weight: WeightInfo) -> None:
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
