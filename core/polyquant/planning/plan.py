"""The plan of one model with one backend."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, prod
from typing import Any, get_args

import msgspec

from polyquant.errors import ConfigError, UnsupportedOperation
from polyquant.loading.cache import require_cache
from polyquant.loading.disk import plans_for_disk
from polyquant.loading.settle import Settled, as_stored, make_command, route_of, settle
from polyquant.memory.predicted import predict, weights_of
from polyquant.packable import is_packed
from polyquant.planning.devices import Budget, arrange
from polyquant.planning.disk import disk_plan
from polyquant.planning.foresee import foresee
from polyquant.planning.model import PlannedModel
from polyquant.planning.process import process_bytes
from polyquant.planning.records import Plan, PlannedTensor, total
from polyquant.registry.backend import Backend
from polyquant.request import KvCache, Offload
from polyquant.support.devices import choose_device
from polyquant.types import DTYPE_BYTES, LayerPlan, Record

DENSE = "every tensor would stay dense, and a load refuses that without allow_dequantize=True"


class Asked(Record, frozen=True):
    """What a plan is asked for, beside model, backend and its options."""

    context: int = 4096
    batch: int = 1
    kv_cache: KvCache = "keep"
    device: str = "auto"
    offload: str = "error"
    speed: bool = False  # whether it is foreseen, which runs a stand-in for the model

    def __post_init__(self) -> None:
        if self.context < 1 or self.batch < 1:
            raise ConfigError(f"context and batch are 1 or more, got context={self.context}, batch={self.batch}")
        if self.offload not in get_args(Offload):
            raise ConfigError(f"offload must be 'error', 'cpu' or 'disk', got {self.offload!r}")
        if self.kv_cache not in get_args(KvCache):
            raise ConfigError(f"kv_cache must be 'keep', 'int8' or 'int4', got {self.kv_cache!r}")


def plan_one(model: PlannedModel, backend: Backend, given: Mapping[str, Any], asked: Asked, budget: Budget) -> Plan:
    """What loading `model` with `backend` takes. Reads no weights, runs nothing of the backend but its plan.

    given: the backend's options as the user wrote them. Raises ConfigError, ModelError, CheckpointConflict, and
    UnsupportedOperation where the backend does not plan.
    """
    device = budget.kind or choose_device(asked.device, backend.capabilities)
    if asked.offload == "cpu" and not backend.capabilities.offloads:
        raise ConfigError(f"{backend.name} cannot offload; leave offload at 'error'")
    require_cache(asked.kv_cache, model, backend.name)
    route = route_of(model.source, backend)
    settled = settle(model, backend, backend.config(given), given, device, route)
    notes, dtype = list(settled.notes), settled.dtype
    if route == "make first":
        notes.append(f"it needs a checkpoint first: {make_command(model.name, backend, given)}")
    weights = model.weights(dtype)
    plans = _layer_plans(model, backend, settled, given, notes)
    tensors = tuple(_tensor(model, settled, plan) for plan in plans)
    on_torch = backend.capabilities.runs_on_torch
    context = model.context(dtype if on_torch else "float16", asked.context, asked.batch, asked.kv_cache)
    if context is None:
        notes.append("the key-value cache is not counted: the model's forward pass cannot be followed without weights")
    sizes, disk = weights_of(tensors, settled.checkpoint, dtype, backend.capabilities), None
    process = process_bytes(model.process_bytes, backend, device)
    kept, activations = (context.kv_cache_bytes, context.activation_bytes) if context else (0, 0)
    if asked.offload == "disk":
        if device.partition(":")[0] != "cpu":
            raise ConfigError(f"offload='disk' is for a CPU, and this is {device}: take device='cpu', or leave it out")
        beside = predict(device, process, sizes._replace(planned=0, file=0), kept, activations).needed
        plans_for_disk(model, backend, settled)
        disk = disk_plan(plans, budget.total_bytes(device) - beside, model.source.config)
        sizes = sizes._replace(planned=disk.split.resident_bytes)
        notes.append(disk.told)
    peaks = predict(device, process, sizes, kept, activations)
    placement = arrange(model, plans, dtype, device, budget if disk is None else Budget(), asked.offload)
    quantized = [tensor for tensor in tensors if tensor.quantized]
    if not quantized:
        notes.append(DENSE)
    count = sum(prod(tensor.shape) for tensor in quantized)
    weight_bits = _weight_bits(settled, quantized)
    foreseen = None
    if asked.speed:
        foreseen = foresee(
            model.config, plans, device, packed=is_packed(settled.options), trust_remote_code=model.trusts_remote_code
        )
    return Plan(
        model=model.name,
        backend=backend.name,
        route=route,
        options=msgspec.to_builtins(settled.options),
        device=device,
        compute_dtype=dtype,
        context=asked.context,
        batch=asked.batch,
        kv_cache=asked.kv_cache,
        tensors=tensors,
        weights_planned_bytes=total(tensors),
        weights_dense_bytes=sum(2 * prod(w.shape) for w in weights if not w.tied_to and w.role != "buffer"),
        quantized_bytes=total(quantized),
        constant_bytes=sum(tensor.constant_bytes for tensor in quantized),
        bits_per_weight=8 * total(quantized) / count if count else 0.0,
        weight_bits=weight_bits,
        level_bits=min(settled.options.level_bits or weight_bits, weight_bits),
        rounding_method=settled.options.rounding_method,
        number_format=settled.options.number_format,
        measured_kl=None if route == "as stored" else _measured_kl(backend, given),
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
        on_disk=disk.split.on_disk if disk else (),
        read_bytes_per_token=disk.split.read_bytes if disk else 0,
        disk_bytes_per_second=disk.bytes_per_second if disk else None,
        notes=(*notes, *placement.notes),
        foreseen=foreseen,
    )


def _weight_bits(settled: Settled, quantized: list[PlannedTensor]) -> float:
    """Nominal bits of most quantized weights; where the options do not say, as for some GGUFs, by the tensors."""
    counts: dict[float, int] = {}
    for tensor in quantized:
        counts[tensor.bits] = counts.get(tensor.bits, 0) + prod(tensor.shape)
    by_tensors = max(counts, key=lambda bits: counts[bits], default=16.0)
    return (settled.options.weight_bits or by_tensors) if quantized else by_tensors


def _measured_kl(backend: Backend, given: Mapping[str, Any]) -> float | None:
    """The card's figure of the preset that `given` comes to; None where it is no preset, or was not measured."""
    config, info = backend.config(given), backend.info
    names = [name for name in info.measured_kl if backend.config(info.presets[name]) == config]
    return info.measured_kl[names[0]] if names else None


def _layer_plans(
    model: PlannedModel, backend: Backend, settled: Settled, given: Mapping[str, Any], notes: list[str]
) -> list[LayerPlan]:
    if backend.can("plan_layers"):
        with as_stored(settled, model.name, backend.name):
            return backend.plan_layers(settled.weights, settled.options)
    if settled.route != "as stored":
        raise UnsupportedOperation(
            f"{backend.name} does not plan from shapes; make its checkpoint first, then plan that: "
            f"{make_command(model.name, backend, given)}"
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


def _tensor(model: PlannedModel, settled: Settled, plan: LayerPlan) -> PlannedTensor:
    packed = ceil(prod(plan.shape) * plan.bits / 8) if plan.quantized else plan.stored_bytes
    found = model.outline.tensors.get(plan.name)
    elsewhere = model.outline.dtype if settled.checkpoint.quantized else settled.checkpoint.dtype
    return PlannedTensor(
        **msgspec.structs.asdict(plan),
        dtype=found.dtype if found else "" if plan.role == "buffer" else elsewhere,
        constant_bytes=max(0, plan.stored_bytes - packed),
    )
