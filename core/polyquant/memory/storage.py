"""What a model really stores: a walk over every storage, each counted once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch

MAX_DEPTH = 4  # an attribute of an attribute of a parameter's attribute: bitsandbytes' nested state is at 3


class Stored(NamedTuple):
    """A storage, under the first name that leads to it."""

    module: str  # the module that owns it
    attribute: str  # path inside the module, such as weight.quant_state.absmax
    nbytes: int
    device: str


def walk(model: torch.nn.Module, first: Collection[str] = ()) -> Iterator[Stored]:
    """Every storage of `model` once: parameters, buffers, tensor subclasses, and tensors in plain attributes.

    first: modules to which a storage belongs that others have too; else it belongs to the first in the model's order.
    """
    seen: set[tuple[str, int]] = set()
    for name, module in sorted(model.named_modules(), key=lambda named: named[0] not in first):
        for attribute, tensor in _module_tensors(module):
            storage = tensor.untyped_storage()
            key = (str(tensor.device), storage.data_ptr())
            if storage.nbytes() and tensor.device.type != "meta" and key not in seen:
                seen.add(key)
                yield Stored(name, attribute, storage.nbytes(), str(tensor.device))


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes of all storages of `model`."""
    return sum(stored.nbytes for stored in walk(model))


def tensor_bytes(holder: Any) -> int:
    """Bytes of all storages that hang off any object, such as a key-value cache."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for _, tensor in _tensors(holder, "", set(), 0)
    }
    return sum(storages.values())


def _module_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    visited: set[int] = set()
    owned = {**module._parameters, **module._buffers}
    plain = {name: value for name, value in vars(module).items() if not name.startswith("_") and name not in owned}
    for name, value in {**owned, **plain}.items():
        yield from _tensors(value, name, visited, 0)


def _tensors(value: Any, path: str, visited: set[int], depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Plain tensors reachable from `value`, with their attribute paths; does not enter modules."""
    if id(value) in visited or depth > MAX_DEPTH or isinstance(value, (torch.nn.Module, type)) or callable(value):
        return
    visited.add(id(value))
    children: dict[str, Any]
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            children = {name: getattr(value, name) for name in value.__tensor_flatten__()[0]}
        else:
            yield path, value
            children = vars(value) if hasattr(value, "__dict__") else {}
    elif isinstance(value, dict):
        children = {str(key): child for key, child in value.items()}
    elif isinstance(value, (list, tuple)):
        children = {str(index): child for index, child in enumerate(value)}
    else:
        children = vars(value) if hasattr(value, "__dict__") else {}
    for name, child in children.items():
        yield from _tensors(child, f"{path}.{name}" if path else name, visited, depth + 1)
