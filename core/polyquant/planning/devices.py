"""Room on devices that need not be there, and which module goes to which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import psutil

from polyquant.errors import ConfigError
from polyquant.loading.placement import arrange as packed_map
from polyquant.options import Dtype
from polyquant.planning.model import PlannedModel
from polyquant.planning.records import Placed
from polyquant.support.sizes import parse_size, size
from polyquant.types import DeviceMap, LayerPlan

LEAST_ROOM = 2**20  # bytes
KINDS = ("cuda", "xpu", "mps", "cpu")


class Budget(NamedTuple):
    """Room, as the user gave it; empty where it is to be looked up."""

    memory: int | None = None
    devices: tuple[tuple[str, int], ...] = ()  # in the order in which they are filled

    @property
    def kind(self) -> str:
        """The kind of the first device given; empty where none was."""
        return self.devices[0][0].partition(":")[0] if self.devices else ""

    def total_bytes(self, device: str) -> int:
        """Room on the devices of the kind that `device` is of."""
        if self.devices:
            kind = device.partition(":")[0]
            return sum(room for name, room in self.devices if name.partition(":")[0] == kind)
        return self.memory if self.memory is not None else free_bytes(device)


class Placement(NamedTuple):
    """Where the modules go."""

    device_map: DeviceMap
    placed: tuple[Placed, ...]
    spilled: tuple[str, ...]
    notes: tuple[str, ...]


def read_budget(memory: int | str | None, devices: str | None) -> Budget:
    """A budget such as '6GiB', and simulated devices such as 'cuda:0=24GiB,cpu=64GiB'. Raises ConfigError."""
    if memory is not None and devices is not None:
        raise ConfigError("give either memory (--memory) or devices (--devices), not both")
    if devices is None:
        return Budget(None if memory is None else _room(memory))
    rooms: dict[str, int] = {}
    for part in devices.split(","):
        name, equals, room = (word.strip() for word in part.partition("="))
        kind, _, index = name.partition(":")
        if not equals or kind not in KINDS or (index and not index.isdigit()) or (kind == "cpu" and index):
            raise ConfigError(f"devices are written as 'cuda:0=24GiB,cuda:1=24GiB,cpu=64GiB', got {devices!r}")
        full = name if kind in ("cpu", "mps") else f"{kind}:{int(index or 0)}"
        if full in rooms:
            raise ConfigError(f"{devices!r} gives {full} twice")
        rooms[full] = _room(room)
    kinds = [kind for kind in KINDS if any(name.partition(":")[0] == kind for name in rooms)]
    return Budget(None, tuple(sorted(rooms.items(), key=lambda pair: kinds.index(pair[0].partition(":")[0]))))


def _room(written: int | str) -> int:
    """Bytes. Raises ConfigError for a number that no model fits in: whoever writes 8 means another unit."""
    count = parse_size(written)
    if count < LEAST_ROOM and str(written).strip().isdigit():
        raise ConfigError(f"{written} is a number of bytes, and no model fits in so few; was {written}GiB meant?")
    return count


def free_bytes(device: str) -> int:
    """What is free on a device of this machine now. Raises ConfigError for one that is not here."""
    kind = device.partition(":")[0]
    if kind == "cpu":
        return int(psutil.virtual_memory().available)
    import torch

    if kind == "cuda" and torch.cuda.is_available():
        indices = [torch.device(device).index] if ":" in device else range(torch.cuda.device_count())
        return sum(torch.cuda.mem_get_info(index)[0] for index in indices)
    raise ConfigError(f"{device} is not here, so its room is not known; give it with --memory 24GiB or --devices")


def arrange(
    model: PlannedModel, plans: Sequence[LayerPlan], dtype: Dtype, device: str, budget: Budget, offload: str
) -> Placement:
    """The device map for the devices given; without any, all on `device`."""
    if not budget.devices:
        return Placement({"": device}, (), (), ())
    rooms = {_key(name): room for name, room in budget.devices}
    skeleton = model.skeleton(dtype)
    device_map = {name: str(where) for name, where in packed_map(skeleton, plans, rooms).items()}
    kind = budget.kind
    named = {str(_key(name)): name for name, _ in budget.devices}
    device_map = {name: named.get(where, where) for name, where in device_map.items()}
    slow = {where for where in device_map.values() if where.partition(":")[0] != kind}
    spilled = tuple(name for name, where in device_map.items() if where in slow)
    placed = []
    for where in dict.fromkeys([*named.values(), *device_map.values()]):
        modules = tuple(name for name, at in device_map.items() if at == where)
        held = sum(plan.stored_bytes for plan in plans if _is_in(plan.name, modules))
        placed.append(
            Placed(device=where, room_bytes=dict(budget.devices).get(where, 0), weights_bytes=held, modules=modules)
        )
    notes = []
    if spilled:
        allowed = offload == "cpu" and "disk" not in slow
        bytes_out = sum(entry.weights_bytes for entry in placed if entry.device in slow)
        notes.append(
            f"{len(spilled)} modules ({size(bytes_out)}) spill to {', '.join(sorted(slow))}"
            + ("" if allowed else ": a load refuses that, unless offload='cpu' (--offload cpu) allows it"
               if "disk" not in slow else ": they fit nowhere, and a load refuses that")
        )  # fmt: skip
    return Placement(device_map, tuple(placed), spilled, tuple(notes))


def _key(name: str) -> int | str:
    """As accelerate names devices: a number for a GPU."""
    return int(name.partition(":")[2]) if ":" in name else name


def _is_in(tensor: str, modules: Sequence[str]) -> bool:
    return any(not module or tensor == module or tensor.startswith(f"{module}.") for module in modules)
