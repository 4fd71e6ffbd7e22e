"""Loads a model: finds its files and its backend, settles everything, calls the backend, and finishes what it gives."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import msgspec

from polyquant.errors import BrokenBackend, CheckpointConflict, ConfigError, DenseModelError, ModelError
from polyquant.isolated import handles
from polyquant.loaded import LoadedModel
from polyquant.loading import adapter, emulation, kernel, quantized_cache
from polyquant.loading.cache import require_cache
from polyquant.loading.disk import blocks_on_disk
from polyquant.loading.options import LoadOptions, split_options
from polyquant.loading.placement import device_map_for
from polyquant.loading.records import total
from polyquant.loading.settle import Route, Settled, as_stored, make_command, needs_dense_file, route_of, settle
from polyquant.loading.stored import is_dense, method_of, reader_of
from polyquant.loading.trial import require_keeping, require_running
from polyquant.models.limits import tokenizer_notes
from polyquant.models.model import Model
from polyquant.models.roles import SKIPPED
from polyquant.options import BackendOptions
from polyquant.packable import LIBRARY, PackableOptions, quantizes_experts
from polyquant.registry.backend import Backend
from polyquant.registry.installed import registry
from polyquant.request import LoadRequest, ModelSource
from polyquant.support.devices import choose_device


def load(model: str | Path, backend: str | None = None, *, revision: str | None = None, **options: Any) -> LoadedModel:
    """See `polyquant.load`."""
    backend, options = handles.written(backend, options)
    how, own = split_options(options)
    handle = handles.backend(backend) if backend else None
    config = handle.config(own) if handle else None  # raises for wrong options before any file is read
    found = Model.find(
        model, revision=revision, allow_pickle=how.allow_pickle, trust_remote_code=how.trust_remote_code,
        progress=how.progress,
    )  # fmt: skip
    if handle is None or config is None:
        handle = handles.backend(reader_for(found.source))
        config = handle.config(own)
    return load_model(found, handle, config, own, how)


def of_config(
    config: BackendOptions, backend: str | None, options: Mapping[str, object]
) -> tuple[str, dict[str, object]]:
    """The backend that a record of options belongs to, and those of its fields that are not at their defaults.

    Raises ConfigError where `backend` or `options` say something else, or no installed backend has such options.
    """
    if options:
        raise ConfigError(f"give options in config, or as keywords, not both: {', '.join(options)}")
    owners = [info.name for info in handles.backends() if info.options is type(config)]
    if backend is None and not owners:
        raise ConfigError(f"{type(config).__name__} is no installed backend's record of options; name the backend")
    if backend is not None and backend not in owners:
        wanted = handles.backend(backend).info.options.__name__
        raise ConfigError(f"{backend} takes {wanted}, and config is {type(config).__name__}")
    fields = msgspec.structs.fields(type(config))
    given = {field.name: getattr(config, field.name) for field in fields
             if getattr(config, field.name) != field.default}  # fmt: skip
    return backend or owners[0], given


def reader_for(source: ModelSource) -> str:
    """The name of the installed backend that reads a quantized checkpoint. Raises ConfigError for a dense one."""
    if is_dense(source):
        known = ", ".join(registry().names()) or "none"
        raise ConfigError(
            f"{source.name} is dense: name the backend to quantize it with (backend=...); installed: {known}"
        )
    return reader_of(method_of(source), handles.backends())


def load_model(
    model: Model, backend: Backend, config: BackendOptions, given: Mapping[str, object], how: LoadOptions
) -> LoadedModel:
    """Load `model` with `backend`; `given` are the options as the user wrote them, `config` the same, checked."""
    route = route_of(model.source, backend)
    if route == "make first":
        can = backend.capabilities
        raise CheckpointConflict(
            f"{model.name} is dense, and {backend.name} loads quantized checkpoints only "
            f"({', '.join(can.loads_prequantized)}); make one with: {make_command(model.name, backend, given)}"
        )
    if how.emulate_activations:
        config = emulation.asked(config, backend.name)
        given = {**given, "kernel": config.kernel} if isinstance(config, PackableOptions) else given
    adapters = adapter.require(how.adapter, backend.capabilities)  # before the weights are read
    request, settled = prepare(model, backend, config, given, how, route)
    with giving_back(settled, asked=how.return_freed_memory):
        chosen = kernel.is_chosen(config, settled.options)
        loaded, failed = _tried(backend, request, settled, chosen=chosen, cached=how.cache)
        if loaded is None:
            library = kernel.with_library(config)
            request, settled = prepare(model, backend, library, {**given, "kernel": LIBRARY}, how, route)
            loaded = load_settled(backend, request, settled, cached=how.cache)
            loaded.notes.append(f"the library multiplies, since the model does not run with packed kernels: {failed}")
    loaded.requested = config
    loaded.notes[:0] = settled.notes
    if how.kv_cache != "keep":
        loaded.notes.append(f"keys and values of all but the newest tokens are kept as {how.kv_cache} codes")
    _require_quantized(loaded, how.allow_dequantize)
    if adapters:
        adapter.attach(loaded, how.adapter, adapters)
    return loaded


def _tried(
    backend: Backend, request: LoadRequest, settled: Settled, *, chosen: bool, cached: bool
) -> tuple[LoadedModel | None, str]:
    """A load; or, where the packed runtime was `chosen` for it, None and why it cannot run with that."""
    try:
        return load_settled(backend, request, settled, cached=cached), ""
    except (ConfigError, ModelError) as error:
        if not chosen:
            raise
        return None, str(error)


def load_settled(backend: Backend, request: LoadRequest, settled: Settled, *, cached: bool = False) -> LoadedModel:
    """What the backend loads, finished: with its tokenizer, the options as a checkpoint stores them, and its layers.

    cached: whether quantized weights are taken from the cache, and kept there.
    Raises ConfigError, with what to skip, for a model that cannot run as it is quantized.
    """
    tokenizer = None
    if backend.capabilities.runs_on_torch and not request.source.gguf_file:
        from polyquant.models import hf

        # before the weights: reading it takes more memory for a moment than it keeps
        tokenizer = hf.load_tokenizer(request.source, trust_remote_code=request.trust_remote_code)
    place = None
    kept = cached and not request.emulate_activations and quantized_cache.is_kept(backend, request, settled)
    if kept or request.on_disk:
        place = quantized_cache.place_of(backend, request, settled)
    restored = quantized_cache.restore(place, backend, request, settled) if place is not None else None
    with as_stored(settled, request.source.name, backend.name):
        if place is not None and restored is None and request.on_disk:
            restored = quantized_cache.make(place, backend, request, settled, _loaded)
        loaded = restored or _loaded(backend, request, settled)
    if loaded.tokenizer is None:
        loaded.tokenizer = tokenizer
    if loaded.tokenizer is None:
        raise BrokenBackend(f"{backend.name}: load gave no tokenizer, and the core reads none of a GGUF: return one")
    if backend.capabilities.runs_on_torch:
        from polyquant.registry import repacked

        if restored is None:
            repacked.finish(loaded, backend)
        loaded.notes += tokenizer_notes(loaded.model, loaded.tokenizer)
    loaded.initial_layers = loaded.layers
    if request.emulate_activations:
        _emulate(loaded)
    if backend.capabilities.runs_on_torch:
        from polyquant.plugin import adapters, quantizer

        quantizer.mark(loaded)
        if "peft" in sys.modules:
            adapters.guard()
        require_running(loaded)
        require_keeping(loaded)
        loaded.tried_bytes = total(loaded.layers)
    if kept and place is not None and restored is None:
        quantized_cache.keep(place, loaded, backend)
    return loaded


def _loaded(backend: Backend, request: LoadRequest, settled: Settled) -> LoadedModel:
    """What the backend loads, as far as it goes layer by layer with each packed at once."""
    if not backend.capabilities.runs_on_torch:
        return backend.load(request, settled)
    from polyquant.registry import repacked

    with repacked.at_once(backend, request, settled):
        return backend.load(request, settled)


def _emulate(loaded: LoadedModel) -> None:
    from polyquant.plugin import activations

    assert loaded.settled is not None  # every load sets it
    loaded.emulated_activations = activations.emulate(loaded, {each.name: each for each in loaded.settled.weights})
    loaded.kernel += f", activations rounded to {loaded.emulated_activations} in software (emulated)"
    loaded.notes.append(
        f"activations are emulated: rounded to {loaded.emulated_activations} before each product, which stays in "
        f"{loaded.config.compute_dtype}; quality is that of kernels which do so, speed and memory are not"
    )


def prepare(
    model: Model, backend: Backend, config: BackendOptions, given: Mapping[str, object], how: LoadOptions,
    route: Route,
) -> tuple[LoadRequest, Settled]:  # fmt: skip
    """What the backend's `load` or `quantize` is asked for, and what is settled about it.

    Raises EnvironmentProblem where the backend cannot run here, before a dense checkpoint is made of a GGUF.
    """
    device = choose_device(how.device, backend.capabilities)
    backend.require(device)
    if how.attention and backend.capabilities.runs_on_torch:
        model.require_attention(how.attention)
    require_cache(how.kv_cache, model, backend.name)
    packed_name = model.source.gguf_file
    first = needs_dense_file(model.source, backend, route)
    if first or backend.capabilities.runs_on_torch:
        model = model.as_transformers_reads(dense=first, progress=how.progress)
    settled = settle(model, backend, config, given, device, route)
    if how.emulate_activations:
        emulation.require(settled, backend.name)
    if (disk := blocks_on_disk(model, backend, settled, how)) is not None:
        settled = msgspec.structs.replace(settled, notes=(*settled.notes, disk.told))
    if first:
        note = f"{packed_name} was dequantized to a float32 checkpoint first, then quantized again"
        settled = msgspec.structs.replace(settled, notes=(note, *settled.notes))
    return (
        LoadRequest(
            source=model.source,
            device=device,
            device_map=device_map_for(model, backend, settled, how),
            weights=settled.weights,
            later=_packed_later(backend, settled, model.name),
            names=model.renamed,
            offload=how.offload,
            on_disk=disk.on_disk if disk is not None else (),
            allow_dequantize=how.allow_dequantize,
            trust_remote_code=how.trust_remote_code,
            allow_pickle=how.allow_pickle,
            attention=how.attention,
            kv_cache=how.kv_cache,
            emulate_activations=how.emulate_activations,
            progress=how.progress,
        ),
        settled,
    )


def _packed_later(backend: Backend, settled: Settled, source: str) -> frozenset[str]:
    """Names of the fused experts that the core packs after the load."""
    if not quantizes_experts(settled.options) or not any(weight.stacked for weight in settled.weights):
        return frozenset()
    with as_stored(settled, source, backend.name):
        plans = backend.plan_layers(settled.weights, settled.options)
    return frozenset(plan.name for plan in plans if plan.role == "experts" and plan.packed is not None)


def giving_back(settled: Settled, *, asked: bool) -> AbstractContextManager[None]:
    """Within it, memory that a load on the CPU frees goes back to the system; see `support.malloc`.

    Of a checkpoint that is quantized as it is read always, beside what `polyquant.plugin.stream` does between tensors:
    int4 of HQQ keeps 180 MB of SmolLM2, and its load added 1039 MB without either, and 259 MB with this. asked: of
    others too.
    """
    from polyquant.support.malloc import freeing_at_once, returning_freed_memory

    if settled.device != "cpu" or not (asked or settled.checkpoint.in_turn):
        return nullcontext()
    # the first leaves least behind, and takes up to three times as long where every layer is quantized
    return freeing_at_once() if settled.checkpoint.quantized else returning_freed_memory()


def _require_quantized(loaded: LoadedModel, allowed: bool) -> None:
    if any(layer.quantized for layer in loaded.initial_layers):
        return
    if not allowed:
        raise DenseModelError(
            f"{loaded.backend.name} left every tensor of the model dense: {_why_dense(loaded)}, or accept a dense "
            "model with allow_dequantize=True"
        )
    loaded.notes.append("the model is dense: nothing was quantized (allow_dequantize)")


def _why_dense(loaded: LoadedModel) -> str:
    """Why nothing was quantized, and what to do."""
    matrices = [layer for layer in loaded.initial_layers if layer.role in ("linear", "experts", "other")]
    if loaded.request is not None and loaded.request.source.gguf_file:
        held = ", ".join(sorted({layer.scheme for layer in matrices})) or "nothing else"
        return f"the file holds its matrices as {held}; take a file with packed ones, or the dense model"
    skipped = [layer for layer in matrices if layer.reason == SKIPPED]
    if skipped and all(layer.reason == SKIPPED for layer in matrices if layer.role == "linear"):
        return f"skip names all {len(skipped)} that it takes, such as {skipped[0].name}; take some out"
    weights = loaded.settled.weights if loaded.settled is not None else ()
    kinds = {weight.module: weight.name for weight in weights if weight.role in ("linear", "experts", "other")}
    named = ", ".join(f"{kind} ({name})" for kind, name in list(kinds.items())[:3]) or "none"
    return f"the modules of its matrices are {named}, which it does not take; choose another backend"
