"""Which module goes to which device, settled before anything loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import psutil

from polyquant.errors import ConfigError, PlacementError, PolyquantError, did_you_mean
from polyquant.loading.disk import plans_for_disk, room_for_weights
from polyquant.loading.options import LoadOptions
from polyquant.loading.settle import Settled, as_stored, settle
from polyquant.memory.on_disk import split
from polyquant.models.model import Model
from polyquant.registry.backend import Backend
from polyquant.request import MaxMemory, Offload
from polyquant.support.devices import available_devices
from polyquant.support.libraries import quiet_imports
from polyquant.support.sizes import size
from polyquant.types import DeviceMap, LayerPlan, WeightInfo


def device_map_for(model: Model, backend: Backend, settled: Settled, how: LoadOptions) -> DeviceMap:
    """The device map of a load: the user's own, checked; all on one device; or packed from planned bytes.

    Raises PlacementError where something would spill and `offload` is 'error', ConfigError for what the backend cannot.
    """
    device = settled.device
    if how.offload == "disk" and (how.device_map != "auto" or device != "cpu"):
        raise ConfigError(
            "offload='disk' is for a model that is on a CPU as a whole: leave device_map out and take device='cpu'; "
            "max_memory={'cpu': '6GiB'} says how much of it stays in memory"
        )
    if how.offload == "disk":  # which blocks, `blocks_on_disk` says
        return {"": device}
    if how.device_map != "auto":
        device_map = check_device_map(how.device_map, settled.weights)
        check_spill(device_map, device, how.offload)
        return device_map
    if how.offload == "cpu" and not backend.capabilities.offloads:
        raise ConfigError(f"{backend.name} cannot offload; leave offload at 'error'")
    small = settled.checkpoint.nbytes < psutil.virtual_memory().available / 2
    plans = backend.can("plan_layers")
    if how.max_memory is None and (not plans or (small and device == "cpu")):
        return {"": device}
    if not plans:
        raise ConfigError(f"{backend.name} does not plan its memory, so max_memory cannot be kept; leave it out")
    with as_stored(settled, model.name, backend.name):
        planned = backend.plan_layers(settled.weights, settled.options)
    try:
        return fill_devices(model.skeleton(settled.dtype), planned, device, how.max_memory, how.offload)
    except PlacementError as error:
        raise PlacementError(f"{error}. {_what_fits(model, backend, settled, how)}") from None


def _what_fits(model: Model, backend: Backend, settled: Settled, how: LoadOptions) -> str:
    """What would fit where a model does not: presets of the same backend, and reading from the disk."""
    room, ways = room_for_weights(how.max_memory) if settled.device == "cpu" else 0, list[str]()
    if settled.route == "on the fly" and settled.device == "cpu":
        for preset, options in backend.info.presets.items():
            try:
                other = settle(model, backend, backend.config(options), options, settled.device, settled.route)
                nbytes = sum(plan.stored_bytes for plan in backend.plan_layers(other.weights, other.options))
            except ConfigError:
                continue
            if nbytes <= room:
                ways.append(f"{backend.name}:{preset} ({size(nbytes)})")
    with suppress(PolyquantError):
        disk = split(plans_for_disk(model, backend, settled), room)
        if settled.device == "cpu" and disk.resident_bytes <= room:
            ways.append(f"offload='disk' (--offload disk), which keeps {size(disk.resident_bytes)} in memory")
    shown = f"What would fit: {', '.join(ways)}" if ways else f"None of {backend.name}'s presets would fit"
    return f"{shown}; polyquant plan {model.name} shows every backend's"


def fill_devices(
    skeleton: Any, plans: Sequence[LayerPlan], device: str, max_memory: MaxMemory | None, offload: Offload
) -> DeviceMap:
    """A device map from planned bytes, filling devices in order; accelerate does the packing.

    max_memory: device -> bytes or '6GiB', as accelerate takes it; None: what is free now. With `device` cpu only
    the cpu is filled. Raises PlacementError where something would spill and `offload` is 'error'.
    """
    from accelerate.utils import convert_file_size_to_int, get_max_memory

    if max_memory is not None:
        limits = {key: convert_file_size_to_int(value) for key, value in max_memory.items()}
    else:
        limits = get_max_memory()
    kind, _, index = device.partition(":")
    usable = {
        key: limit
        for key, limit in limits.items()
        if key == "cpu" or (kind != "cpu" and (not index or key in (int(index), device)))
    }
    device_map = arrange(skeleton, plans, usable)
    check_spill(device_map, device, offload, sum(plan.stored_bytes for plan in plans), usable)
    return device_map


def arrange(skeleton: Any, plans: Sequence[LayerPlan], rooms: MaxMemory) -> DeviceMap:
    """The device map that accelerate packs from planned bytes; it replaces the skeleton's tensors by ones of that size.

    rooms: device -> bytes, filled in that order; what fits none of them goes to disk. The devices need not be there.
    """
    import torch
    from accelerate import infer_auto_device_map

    sizes = {plan.name: plan.stored_bytes for plan in plans}
    for name, module in skeleton.named_modules():
        for short in list(module._parameters):
            size = sizes.get(f"{name}.{short}" if name else short)
            if module._parameters[short] is not None and size is not None:
                planned = torch.empty(size, dtype=torch.uint8, device="meta")
                module._parameters[short] = torch.nn.Parameter(planned, requires_grad=False)
    skeleton.tie_weights()
    with quiet_imports():  # accelerate warns of devices that are not there
        device_map: DeviceMap = infer_auto_device_map(
            skeleton, max_memory=dict(rooms), no_split_module_classes=skeleton._no_split_modules
        )
    return device_map


def check_spill(
    device_map: DeviceMap, device: str, offload: Offload, planned_bytes: int = 0, limits: MaxMemory | None = None
) -> None:
    """Raises PlacementError where modules sit on a slower device than `device` and `offload` is 'error'."""
    slow = ("disk",) if device == "cpu" else ("cpu", "disk")
    spilled = {name: where for name, where in device_map.items() if str(where) in slow}
    if not spilled or (offload == "cpu" and "disk" not in spilled.values()):
        return
    shown = ", ".join(f"{name or 'the whole model'} -> {where}" for name, where in list(spilled.items())[:5])
    room = f"; planned {planned_bytes / 2**20:.0f} MiB, room for {_shown(limits)}" if limits else ""
    way_out = (
        "allow it with offload='cpu' (--offload cpu), " if device != "cpu" and "disk" not in spilled.values() else ""
    )
    raise PlacementError(
        f"{len(spilled)} modules would not be on {device}: {shown}{room}; {way_out}"
        "choose fewer bits or a smaller model, or raise max_memory (--max-memory)"
    )


def check_device_map(device_map: Any, weights: Sequence[WeightInfo] = ()) -> DeviceMap:
    """A user's own device map. weights: of the model; none where only its runtime knows them.

    Raises ConfigError where it is not module name -> device, where a name or a device is not there, or where a part of
    the model has no device.
    """
    if not isinstance(device_map, Mapping) or not device_map:
        raise ConfigError(f"device_map must be 'auto' or a mapping from module names to devices, got {device_map!r}")
    wanted = {str(name): where if isinstance(where, int) else str(where) for name, where in device_map.items()}
    _require_devices(wanted)
    if weights:
        _require_modules(wanted, weights)
    return wanted


def _require_devices(device_map: DeviceMap) -> None:
    here = available_devices()
    known = {*here, *(name.partition(":")[0] for name in here), *range(len(here) - 1), "disk"}
    if astray := [
        f"{name or 'the whole model'} -> {where}" for name, where in device_map.items() if where not in known
    ]:
        raise ConfigError(
            f"the device map names devices that are not here: {', '.join(astray[:3])}; "
            f"there are {', '.join(here)} (and disk)"
        )


def _require_modules(device_map: DeviceMap, weights: Sequence[WeightInfo]) -> None:
    names = [weight.name.split(".") for weight in weights]
    modules = {".".join(parts[:end]) for parts in names for end in range(1, len(parts) + 1)}
    for name in device_map:
        if name and name not in modules:
            raise ConfigError(
                f"the device map names {name!r}, which is no module of the model.{did_you_mean(name, modules)}"
            )
    own = [weight.name for weight in weights if weight.role != "buffer" and not weight.tied_to]
    left = [tensor for tensor in own if not any(_is_within(tensor, name) for name in device_map)]
    if left:
        raise ConfigError(
            f"the device map gives {len(left)} of {len(own)} tensors no device: {', '.join(left[:3])}; "
            "name their modules too, or take '' for the whole model"
        )


def _is_within(tensor: str, module: str) -> bool:
    return not module or tensor == module or tensor.startswith(f"{module}.")


def _shown(limits: MaxMemory) -> str:
    return ", ".join(f"{key}: {int(value) / 2**20:.0f} MiB" for key, value in limits.items())
