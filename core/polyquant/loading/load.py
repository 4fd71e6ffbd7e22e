"""Settles everything about a load, in this order: options, files, machine, dtype, skipped modules, placement."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import msgspec
import psutil

from polyquant.errors import CheckpointConflict, ConfigError, DenseModelError
from polyquant.loaded import LoadedModel, Owner
from polyquant.loading import stored
from polyquant.loading.placement import MaxMemory, check_device_map, check_spill, place
from polyquant.options import BackendOptions, Dtype
from polyquant.registry.backend import Backend
from polyquant.request import LoadRequest, ModelSource, Offload
from polyquant.support.environment import choose_device
from polyquant.types import DeviceMap, LayerPlan


class LoadOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to load, whatever the backend."""

    device: str = "auto"
    device_map: Any = "auto"
    max_memory: MaxMemory | None = None
    offload: Offload = "error"
    allow_dequantize: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False
    attention: str = ""
    adapter: str = ""
    progress: bool = False


def load(
    source: ModelSource, backend: Backend, config: BackendOptions, given: Mapping[str, object], how: LoadOptions
) -> LoadedModel:
    """Load `source` with `backend`; `given` are the options as the user wrote them, `config` the same, checked."""
    from polyquant.support.malloc import freeing_at_once, returning_freed_memory

    request, effective, notes = prepare(source, backend, config, given, how)
    # the first leaves least behind, and takes a tenth longer where every layer is quantized
    giving_back = freeing_at_once if source.stored_quantization else returning_freed_memory
    with giving_back() if request.device == "cpu" else nullcontext():
        loaded = backend.load(request, effective)
    loaded.requested = config
    loaded.notes[:0] = notes
    loaded.initial_layers = loaded.layers
    _require_quantized(loaded, how.allow_dequantize)
    if how.adapter:
        from polyquant.loading.adapter import attach

        attach(loaded, how.adapter)
    return loaded


def prepare(
    source: ModelSource, backend: Backend, config: BackendOptions, given: Mapping[str, object], how: LoadOptions,
    *, to_quantize: bool = False,
) -> tuple[LoadRequest, BackendOptions, list[str]]:  # fmt: skip
    """The request and effective options of a load, and what a user should know about them.

    to_quantize: the load is for the `quantize` hook, which takes a dense model (a GGUF too, where the backend reads
        those) whatever the backend loads.
    """
    notes: list[str] = []
    source, stored = _with_stored(source, backend, how, notes, to_quantize=to_quantize)
    if stored is not None:
        config = stored.reconcile(source, stored, config, given)
    device = choose_device(how.device, backend.capabilities)
    backend.require(device)
    if source.config and backend.capabilities.torch_module:
        from polyquant.models import hf, versions

        source = versions.readable(source)
        hf.read_config(source, trust_remote_code=how.trust_remote_code)
    config = msgspec.structs.replace(config, compute_dtype=compute_dtype(config, backend, device))
    if stored is None and not backend.capabilities.only_gguf and (config.skip or not config.skip_defaults):
        config = _with_skips(source, config, how)
    return (
        LoadRequest(
            source=source,
            device=device,
            device_map=_device_map(source, backend, config, device, how),
            offload=how.offload,
            allow_dequantize=how.allow_dequantize,
            trust_remote_code=how.trust_remote_code,
            allow_pickle=how.allow_pickle,
            attention=how.attention,
            progress=how.progress,
        ),
        config,
        notes,
    )


def compute_dtype(config: BackendOptions, backend: Backend, device: str) -> Dtype:
    """The one compute dtype of a load: as asked, else the backend's measured choice for the device.

    CUDA without a choice of the backend's: bfloat16 from compute capability 8.0, float16 below.
    """
    if config.compute_dtype != "auto":
        return config.compute_dtype
    kind = device.partition(":")[0]
    if kind in backend.info.compute_dtypes:
        return backend.info.compute_dtypes[kind]
    if kind != "cuda":
        return "bfloat16"
    import torch

    return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"


def plan(
    source: ModelSource, backend: Owner, config: BackendOptions, *, trust_remote_code: bool = False
) -> list[LayerPlan]:
    """Predicted bytes of each tensor. Raises UnsupportedOperation where the backend does not plan."""
    from polyquant.memory.weights import list_weights
    from polyquant.models import hf
    from polyquant.options import resolved_dtype

    skeleton = hf.skeleton(source, resolved_dtype(config), trust_remote_code=trust_remote_code)
    return backend.plan_layers(list_weights(skeleton), config)


def _with_stored(
    source: ModelSource, backend: Backend, how: LoadOptions, notes: list[str], *, to_quantize: bool
) -> tuple[ModelSource, BackendOptions | None]:
    """The source to load, and the options stored in it where it is quantized already."""
    capabilities, method = backend.capabilities, stored.method_of(source)
    reads_dense = capabilities.on_the_fly or to_quantize
    if method == "gguf" and "gguf" not in capabilities.loads_prequantized and reads_dense:
        from polyquant.models.builtin import dense_from_gguf
        from polyquant.models.checks import check_folder

        notes.append(f"{source.gguf_file} was dequantized to a float32 checkpoint first, then quantized again")
        return check_folder(dense_from_gguf(source, progress=how.progress), source.name), None
    if method and to_quantize and method != "gguf":
        raise CheckpointConflict(f"{source.name} is quantized already with {method!r}; give the dense model")
    if to_quantize:
        return source, None
    if method:
        return source, stored.stored_options(source, backend.info, method)
    if not capabilities.on_the_fly:
        maker = "gguf" if capabilities.only_gguf else backend.name
        makes = capabilities.only_gguf or backend.can("quantize")
        raise CheckpointConflict(
            f"{source.name} is dense, and {backend.name} loads quantized checkpoints only "
            f"({', '.join(capabilities.loads_prequantized)}); "
            + (
                f"make one with: polyquant quantize {source.name} --backend {maker} --out DIR"
                if makes
                else "it makes none: give one that was made elsewhere, or take another backend"
            )
        )
    return source, None


def _with_skips(source: ModelSource, config: BackendOptions, how: LoadOptions) -> BackendOptions:
    """`skip` as full module names, defaults included; `skip_defaults` is then spent."""
    from polyquant.memory.weights import list_weights, resolved_skips
    from polyquant.models import hf
    from polyquant.options import resolved_dtype

    skeleton = hf.skeleton(source, resolved_dtype(config), trust_remote_code=how.trust_remote_code)
    return resolved_skips(list_weights(skeleton), config)


def _device_map(
    source: ModelSource, backend: Backend, config: BackendOptions, device: str, how: LoadOptions
) -> DeviceMap:
    if how.device_map != "auto":
        device_map = check_device_map(how.device_map)
        check_spill(device_map, device, how.offload)
        return device_map
    if how.offload == "cpu" and not backend.capabilities.offloads:
        raise ConfigError(f"{backend.name} cannot offload; leave offload at 'error'")
    small = source.checkpoint_bytes < psutil.virtual_memory().available / 2
    plans = backend.can("plan_layers")
    if how.max_memory is None and (not plans or (small and device == "cpu")):
        return {"": device}
    if not plans:
        raise ConfigError(f"{backend.name} does not plan its memory, so max_memory cannot be kept; leave it out")
    from polyquant.memory.weights import list_weights
    from polyquant.models import hf
    from polyquant.options import resolved_dtype

    skeleton = hf.skeleton(source, resolved_dtype(config), trust_remote_code=how.trust_remote_code)
    return place(skeleton, backend.plan_layers(list_weights(skeleton), config), device, how.max_memory, how.offload)


def _require_quantized(loaded: LoadedModel, allowed: bool) -> None:
    if any(layer.quantized for layer in loaded.initial_layers):
        return
    if not allowed:
        raise DenseModelError(
            f"{loaded.backend.name} left every tensor of the model dense; "
            "check the skip patterns and the architecture, or accept a dense model with allow_dequantize=True"
        )
    loaded.notes.append("the model is dense: nothing was quantized (allow_dequantize)")
