"""The plan of one model with one backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, prod
from typing import Any

import msgspec

from polyquant.errors import ConfigError, UnsupportedOperation
from polyquant.loading import load as loading
from polyquant.loading import stored
from polyquant.memory.planned import DTYPE_BYTES
from polyquant.memory.predicted import Checkpoint, predict, weights_of
from polyquant.options import BackendOptions, Dtype
from polyquant.planning.devices import Budget, arrange
from polyquant.planning.model import PlannedModel
from polyquant.planning.process import process_bytes
from polyquant.planning.records import Plan, PlannedTensor, total
from polyquant.registry.backend import Backend
from polyquant.support.environment import choose_device
from polyquant.types import LayerPlan, Record, WeightInfo

DENSE = "every tensor would stay dense, and a load refuses that without allow_dequantize=True"


class Asked(Record, frozen=True):
    """What a plan is asked for, beside model, backend and its options."""

    context: int = 4096
    batch: int = 1
    device: str = "auto"
    offload: str = "error"

    def __post_init__(self) -> None:
        if self.context < 1 or self.batch < 1:
            raise ConfigError(f"context and batch are 1 or more, got context={self.context}, batch={self.batch}")
        if self.offload not in ("error", "cpu"):
            raise ConfigError(f"offload must be 'error' or 'cpu', got {self.offload!r}")


def plan_one(model: PlannedModel, backend: Backend, given: Mapping[str, Any], asked: Asked, budget: Budget) -> Plan:
    """What loading `model` with `backend` takes. Reads no weights, runs nothing of the backend but its plan.

    given: the backend's options as the user wrote them. Raises ConfigError, ModelError, CheckpointConflict, and
    UnsupportedOperation where the backend does not plan.
    """
    device = budget.kind or choose_device(asked.device, backend.capabilities)
    if asked.offload == "cpu" and not backend.capabilities.offloads:
        raise ConfigError(f"{backend.name} cannot offload; leave offload at 'error'")
    notes: list[str] = []
    config, stored = _config(model, backend, given, notes)
    dtype = _dtype(config, backend, device)
    config = msgspec.structs.replace(config, compute_dtype=dtype)
    weights = model.weights(dtype)
    if not stored and not backend.capabilities.only_gguf and (config.skip or not config.skip_defaults):
        from polyquant.memory.weights import resolved_skips

        config = resolved_skips(weights, config)
    plans = _layer_plans(model, backend, weights, config, given, notes)
    tensors = tuple(_tensor(model, weights, plan) for plan in plans)
    context = model.context("float16" if not backend.capabilities.torch_module else dtype, asked.context, asked.batch)
    if context is None:
        notes.append("the key-value cache is not counted: the model's forward pass cannot be followed without weights")
    checkpoint = _checkpoint(model, weights, tensors, stored=stored)
    sizes = weights_of(tensors, checkpoint, dtype, backend.capabilities)
    process = process_bytes(model.process_bytes, backend, device)
    kv_cache, activations = context or (0, 0)
    peaks = predict(device, process, sizes, kv_cache, activations)
    placement = arrange(model, plans, dtype, device, budget, asked.offload)
    quantized = [tensor for tensor in tensors if tensor.quantized]
    if not quantized:
        notes.append(DENSE)
    count = sum(prod(tensor.shape) for tensor in quantized)
    return Plan(
        model=model.name,
        backend=backend.name,
        options=msgspec.to_builtins(config),
        device=device,
        compute_dtype=dtype,
        context=asked.context,
        batch=asked.batch,
        tensors=tensors,
        weights_planned_bytes=total(tensors),
        weights_dense_bytes=sum(2 * prod(w.shape) for w in weights if not w.tied_to and w.role != "buffer"),
        quantized_bytes=total(quantized),
        constant_bytes=sum(tensor.constant_bytes for tensor in quantized),
        bits_per_weight=8 * total(quantized) / count if count else 0.0,
        kv_cache_bytes=context.kv_cache_bytes if context else None,
        activation_bytes=context.activation_bytes if context else None,
        checkpoint_bytes=model.outline.checkpoint_bytes,
        process_bytes=process,
        load_peak_bytes=peaks.load,
        run_peak_bytes=peaks.run,
        reclaimable_bytes=peaks.reclaimable,
        needed_bytes=peaks.needed,
        memory_bytes=budget.total_bytes(device),
        device_map=placement.device_map,
        placed=placement.placed,
        spilled=placement.spilled,
        notes=(*notes, *placement.notes),
    )


def _config(
    model: PlannedModel, backend: Backend, given: Mapping[str, Any], notes: list[str]
) -> tuple[BackendOptions, bool]:
    """The effective options, and whether the checkpoint is quantized already."""
    source, capabilities = model.outline.source, backend.capabilities
    config, method = backend.config(given), stored.method_of(source)
    if method and not (method == "gguf" and "gguf" not in capabilities.loads_prequantized and capabilities.on_the_fly):
        stored = stored.stored_options(source, backend.info, method)
        return stored.reconcile(source, stored, config, given), True
    if method == "gguf":
        notes.append("the GGUF is made a float32 checkpoint first, then quantized again")
    elif not capabilities.on_the_fly:
        if not backend.can("quantize"):
            raise UnsupportedOperation(
                f"{backend.name} reads checkpoints quantized with {', '.join(capabilities.loads_prequantized)}, and "
                "makes none of a dense model"
            )
        notes.append(f"it needs a checkpoint first: {quantize_command(model.name, backend.name, given)}")
    return config, False


def quantize_command(model: str, backend: str, options: Mapping[str, Any]) -> str:
    """The command that writes the checkpoint."""
    return f"polyquant quantize {model} --backend {backend}{as_flags(options)} --out DIR"


def as_flags(options: Mapping[str, Any]) -> str:
    """Options as the command line takes them, with a blank before each."""
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f" --{flag}" if value else f" --no-{flag}")
        else:
            words.append(f" --{flag} {','.join(value) if isinstance(value, (list, tuple)) else value}")
    return "".join(words)


def _dtype(config: BackendOptions, backend: Backend, device: str) -> Dtype:
    """As a load settles it; a GPU that is not here is taken to be one that has bfloat16."""
    if device.partition(":")[0] == "cuda":
        import torch

        if not torch.cuda.is_available():
            return (
                config.compute_dtype
                if config.compute_dtype != "auto"
                else backend.info.compute_dtypes.get("cuda", "bfloat16")
            )
    return loading.compute_dtype(config, backend, device)


def _layer_plans(
    model: PlannedModel, backend: Backend, weights: list[WeightInfo], config: BackendOptions,
    given: Mapping[str, Any], notes: list[str],
) -> list[LayerPlan]:  # fmt: skip
    if backend.can("plan_layers"):
        return backend.plan_layers(weights, config)
    if not model.outline.source.gguf_file:
        raise UnsupportedOperation(
            f"{backend.name} does not plan from shapes; make its checkpoint first, then plan that: "
            f"{quantize_command(model.name, backend.name, given)}"
        )
    notes.append(f"{backend.name} maps the file as it is: the tensors are the file's")
    return [
        LayerPlan(
            name=name, shape=tensor.shape, role="linear" if len(tensor.shape) > 1 else "vector",
            stored_bytes=tensor.nbytes, bits=8 * tensor.nbytes / prod(tensor.shape), scheme=tensor.dtype,
            quantized=tensor.dtype not in DTYPE_BYTES,
            reason="" if tensor.dtype not in DTYPE_BYTES else f"the file holds it as {tensor.dtype}",
        )
        for name, tensor in model.outline.tensors.items()
    ]  # fmt: skip


def _tensor(model: PlannedModel, weights: Sequence[WeightInfo], plan: LayerPlan) -> PlannedTensor:
    packed = ceil(prod(plan.shape) * plan.bits / 8) if plan.quantized else plan.stored_bytes
    found = model.outline.tensors.get(plan.name)
    return PlannedTensor(
        **msgspec.structs.asdict(plan),
        dtype=found.dtype if found else "" if plan.role == "buffer" else model.outline.dtype,
        constant_bytes=max(0, plan.stored_bytes - packed),
    )


def _checkpoint(
    model: PlannedModel, weights: list[WeightInfo], tensors: Sequence[PlannedTensor], *, stored: bool
) -> Checkpoint:
    """What a load reads: the files as they are, or the dense checkpoint they are made into first."""
    if not stored:
        dtype = "float32" if model.outline.source.gguf_file else model.outline.dtype
        return Checkpoint(model.dense_file_bytes(weights), dtype, quantized=False)
    dtype = next((tensor.dtype for tensor in tensors if tensor.role == "embedding"), model.outline.dtype)
    return Checkpoint(model.outline.checkpoint_bytes, dtype, quantized=True)
