"""Keys and values of transformers' dynamic cache as the kernels' steps take and extend them. Imports torch."""

from __future__ import annotations

import sys
from typing import Any

import torch

from polyquant.models.versions import empty_cache

SPARE = 256  # positions that a cache gets beyond those it holds
PLAIN = ("DynamicLayer", "DynamicSlidingWindowLayer")


class Held:
    """The keys and values of a cache, as steps take and extend them."""

    def __init__(self, layers: list[Any], rooms: list[Room], texts: int, seen: int) -> None:
        self._layers, self._rooms, self._texts, self.seen = layers, rooms, texts, seen
        self._written = 0  # positions that the layers do not show yet
        self._fields = torch.tensor([room.fields() for room in rooms])  # integers of 64 bits, as all of the structure
        self._keys_and_values, self._held = self._fields[:, :2], self._fields[:, 3]  # views
        self._most = torch.tensor([room.most for room in rooms])
        self._each = torch.tensor([[room.each] for room in rooms])
        self._slides = any(room.slides for room in rooms)
        self._left = min(room.left for room in rooms)
        self.address = self._fields.data_ptr()

    @classmethod
    def of(cls, cache: Any, texts: int, layers: int, tokens: int) -> Held | None:
        """Those of a cache of so many layers, with room for so many tokens; None where one is not of a plain kind."""
        rooms = [room for layer in cache.layers if (room := _room_of(layer, texts, tokens)) is not None]
        if not len(rooms) == len(cache.layers) == layers:
            return None
        return cls(cache.layers, rooms, texts, cache.get_seq_length())

    def takes(self, texts: int, tokens: int) -> bool:
        """Whether each layer can take so many positions more, of so many texts."""
        return texts == self._texts and self._written + tokens <= self._left

    def grow(self, tokens: int) -> None:
        """A step has written the next positions; layers with a window let go of the oldest."""
        self.seen, self._written = self.seen + tokens, self._written + tokens
        self._held += tokens
        if self._slides:
            gone = (self._held - self._most).clamp(min=0)
            self._held -= gone
            self._keys_and_values += gone[:, None] * self._each

    def show(self) -> None:
        """Have the layers show all positions."""
        for room, layer in zip(self._rooms, self._layers, strict=True):
            room.grow(layer, self._written)
        self._written = 0


class Room:
    """Keys and values of a cache's layer at the front of tensors with room for more.

    The layer's own tensors are views of these: what else is done with them finds what it expects.
    """

    def __init__(self, layer: Any, tokens: int) -> None:
        texts, heads, self.held, width = layer.keys.shape
        self.start, self.size = 0, self.held + tokens - 1 + SPARE
        self.slides = hasattr(layer, "cumulative_length")
        self.most = layer.sliding_window - 1 if self.slides else sys.maxsize  # positions that are held after a step
        self._whole = [tensor.new_empty(texts, heads, self.size, width) for tensor in (layer.keys, layer.values)]
        for whole, tensor in zip(self._whole, (layer.keys, layer.values), strict=True):
            whole[:, :, : self.held] = tensor
        self.each = width * self._whole[0].itemsize  # bytes of a position of a head
        self._show(layer)

    @property
    def left(self) -> int:
        """Positions that it can take."""
        return int(self.size - self.start - self.held)

    def is_of(self, layer: Any, tokens: int) -> bool:
        """Whether it holds what the layer does, and can take so many positions more."""
        return layer.keys is self.keys and layer.values is self.values and self.left >= tokens

    def fields(self) -> tuple[int, int, int, int]:
        """As the kernels take it."""
        keys, values = (
            whole.data_ptr() + self.start * self.each for whole in self._whole
        )  # a view of nothing has none
        return keys, values, self.size, self.held

    def grow(self, layer: Any, written: int) -> None:
        """Have the layer show the positions that so many steps have written, without those that its window has left."""
        self.held += written
        if self.slides:
            layer.cumulative_length += written
            gone = max(0, self.held - self.most)
            self.start, self.held = self.start + gone, self.held - gone
        self._show(layer)

    def _show(self, layer: Any) -> None:
        self.keys, self.values = (whole.narrow(2, self.start, self.held) for whole in self._whole)
        layer.keys, layer.values = self.keys, self.values


def new_cache(config: Any, uses: bool | None) -> Any:
    """What a decoder makes where it is given no cache; None where it makes none. uses: as its caller says, or None."""
    wanted = getattr(config, "use_cache", False) if uses is None else uses
    return empty_cache(config) if wanted else None


def begin(cache: Any, texts: int, layers: int, heads: int, width: int) -> None:
    """Have a dynamic cache that holds nothing yet hold no positions of so many texts and layers."""
    if all(type(layer).__name__ in PLAIN and not layer.is_initialized for layer in cache.layers):
        none = torch.empty(texts, heads, 0, width)
        for index in range(layers):
            cache.update(none, none, index)


def _room_of(layer: Any, texts: int, tokens: int) -> Room | None:
    """A layer's keys and values with room for more positions; None for a layer that is not of the plain kinds."""
    if type(layer).__name__ not in PLAIN or not layer.is_initialized:
        return None
    keys = layer.keys
    if keys.dim() != 4 or len(keys) != texts or keys.dtype != torch.float32 or keys.device.type != "cpu":
        return None
    if keys.shape != layer.values.shape or getattr(layer, "record_past", False) or (
        getattr(layer, "sliding_window", 2) < 2):  # fmt: skip
        return None
    room: Room | None = layer.__dict__.get("_room")
    if room is None or not room.is_of(layer, tokens):
        room = layer.__dict__["_room"] = Room(layer, tokens)
    return room
