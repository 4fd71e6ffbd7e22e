"""A whole decode step as one call of the kernels, behind the unchanged `forward` of a transformers decoder.

Python's own share of a step is 17 ms in a model of 30 layers, in which the kernels make three. What is not known to be
the plain case (several tokens, masks, hooks, adapters, other caches, gradients) goes the usual way. Imports torch.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from copy import deepcopy
from functools import update_wrapper
from inspect import signature
from operator import is_, methodcaller
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from polyquant.packed_weights import kernels
from polyquant.packed_weights.decoder import Decoder, NormOf, decoder_of
from polyquant.packed_weights.linear import RepackedLinear

MOST_TEXTS = 4
SPARE = 256  # positions that a cache gets beyond those it holds
TRIED, TOLERANCE = 5, 1e-2  # tokens, and the part of the largest output by which the two ways may differ
KNOWN = (
    "input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "cache_position", "return_dict",
    "tokenizer",
)  # fmt: skip
"""What a decoder may be given; `generate` passes a tokenizer on, which none reads."""
STATIC = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embeddings whose angles depend on nothing but the position."""
TURNED = 64  # positions whose cosines and sines are computed at once
HOOKED = methodcaller("__contains__", "_hf_hook")
NORMS = ("before_attention", "query_norm", "key_norm", "after_attention", "before_mlp", "after_mlp")


def attach(model: Any) -> bool:
    """Let the kernels make the steps of a causal language model. Whether they do.

    Its decoder's `forward` is replaced on the object; what it answers is the same to `TOLERANCE`, or it is left alone.
    """
    if kernels.library() is None or not hasattr(model, "get_decoder") or not hasattr(DynamicCache(), "layers"):
        return False
    inner = model.get_decoder()
    known = None if inner is model else decoder_of(inner)
    if known is None:
        return False
    step = DecodeStep(inner, known)
    if not _agree(inner, step):
        return False
    inner.forward = Forward(inner, step)
    return True


class Forward:
    """A decoder's `forward` that takes the step where it can. A copy of the decoder has its own, the usual one."""

    def __init__(self, model: Any, step: DecodeStep) -> None:
        self._model, self._step, self._usual = model, step, model.forward
        update_wrapper(self, self._usual)
        self.__signature__ = signature(self._usual)

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        """See the decoder's own."""
        if not arguments and (answer := self._step.answer(more)) is not None:
            return answer
        return self._usual(*arguments, **more)

    def show_late(self, cache: Any) -> None:
        """From now on, have a cache's layers show what steps have written only where it is gone another way, or `show`.

        Saves a part of each step, for who keeps the cache to himself.
        """
        self._step.late.add(cache)

    def show(self, cache: Any) -> None:
        """Have a cache's layers show everything, now and after each step."""
        self._step.show(cache)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _usual_of(deepcopy(self._model, memo))

    def __reduce__(self) -> Any:
        return _usual_of, (self._model,)


def _usual_of(model: Any) -> Any:
    return MethodType(type(model).forward, model)


def _agree(inner: Any, step: DecodeStep) -> bool:
    """Whether a step answers what the decoder itself does, after some tokens."""
    ids = torch.arange(TRIED)[None] % inner.embed_tokens.num_embeddings
    last = {"input_ids": ids[:, -1:], "use_cache": True}
    with torch.inference_mode():
        before = inner(input_ids=ids[:, :-1], use_cache=True).past_key_values
        other = deepcopy(before)
        usual = inner(past_key_values=before, **last).last_hidden_state
        answer = step.answer({"past_key_values": other, **last})
    if answer is None:
        return False
    pairs = [(usual, answer.last_hidden_state)]
    for one, two in zip(before.layers, other.layers, strict=True):
        pairs += [(one.keys, two.keys), (one.values, two.values)]
    return all(
        one.shape == two.shape and bool((one - two).abs().max() <= TOLERANCE * one.abs().max()) for one, two in pairs
    )


class DecodeStep:
    """The steps of one decoder."""

    def __init__(self, model: Any, decoder: Decoder) -> None:
        self._model, self._decoder = model, decoder
        self._kept: list[Any] = []  # what the structures point to
        self._table: tuple[int, Tensor] = (-1, torch.empty(0))  # the first position, and angles from it on
        self._watched = Watched(model)
        self.late = WeakSet[Any]()  # caches that show late what is written
        self._held = WeakKeyDictionary[Any, Held]()  # of caches that do not show everything yet
        self._structure = self._built()

    def answer(self, given: Mapping[str, Any]) -> Any:
        """The decoder's output for one token of each text; None where it is not the plain case."""
        ids: Any = given.get("input_ids")
        cache: Any = given.get("past_key_values")
        held = self._plain(given, ids, cache)
        if held is None:
            return None
        positions = given.get("position_ids")
        if positions is None:
            positions = torch.tensor([[held.seen]])
        embedded = self._model.embed_tokens(ids)
        hidden = (embedded.reshape(len(ids), -1) * self._decoder.embedding_scale).contiguous()
        angles = self._angles(embedded, positions, len(ids))
        status = kernels.functions().pq_step(
            ctypes.byref(self._structure), held.address, hidden.data_ptr(), len(ids), angles[0].data_ptr(),
            angles[1].data_ptr(), kernels.ACTIVATIONS["int16"], torch.get_num_threads(),
        )  # fmt: skip
        kernels.require(status)
        held.grow()
        if cache not in self.late:
            self.show(cache)
        return BaseModelOutputWithPast(last_hidden_state=hidden[:, None], past_key_values=cache)

    def show(self, cache: Any) -> None:
        """Have a cache's layers show what steps have written; see `Forward.show`."""
        self.late.discard(cache)
        if (held := self._held.pop(cache, None)) is not None:
            held.show()

    def _plain(self, given: Mapping[str, Any], ids: Any, cache: Any) -> Held | None:
        """The cache's keys and values with room for a token; None, all of it shown, where it goes the usual way."""
        if type(cache) is not DynamicCache:
            return None
        held = self._held.get(cache)
        is_plain = self._is_plain(given, ids)
        if held is not None and not (is_plain and held.takes(len(ids))):
            self._held.pop(cache).show()
            held = None
        if is_plain and held is None:
            held = Held.of(cache, len(ids), len(self._decoder.layers))
            if held is not None:
                self._held[cache] = held
        return held

    def _is_plain(self, given: Mapping[str, Any], ids: Any) -> bool:
        """Whether this is one token for each of a few texts, all of whose earlier ones are seen, and nothing else."""
        model, mask = self._model, given.get("attention_mask")
        return (
            isinstance(ids, Tensor)
            and ids.dim() == 2
            and ids.shape[1] == 1
            and 0 < len(ids) <= MOST_TEXTS
            and given.get("use_cache") is not False
            and (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all())))
            and all(name in KNOWN or value is None or value is False for name, value in given.items())
            and not (torch.is_grad_enabled() or model.training or torch.compiler.is_compiling())
            and not (torch.is_autocast_enabled("cpu") or model.config.output_attentions)
            and not model.config.output_hidden_states
            and self._watched.are_as_they_were()
        )

    def _angles(self, like: Tensor, positions: Tensor, texts: int) -> Tensor:
        """Cosines and sines, (2, rotations, texts, width), from the model's own module."""
        if len(positions) == 1 and self._is_static():
            position, (first, table) = int(positions[0, 0]), self._table
            if not 0 <= position - first < TURNED or first < 0:
                first = position // TURNED * TURNED
                table = self._turned(like, torch.arange(first, first + TURNED)[None])
                self._table = first, table
            angles = table[:, :, position - first : position - first + 1]
        else:
            angles = self._turned(like, positions)
        return angles.expand(2, angles.shape[1], texts, angles.shape[3]).contiguous()

    def _turned(self, like: Tensor, positions: Tensor) -> Tensor:
        """Cosines and sines, (2, rotations, positions, width): of each kind of layer, and of those without rotation."""
        pairs = []
        for kind in self._decoder.rotations:
            cosine, sine = self._model.rotary_emb(like, positions, *((kind,) if kind else ()))
            pairs.append(torch.stack([each.reshape(-1, each.shape[-1]).float() for each in (cosine, sine)]))
        if not all(layer.rotates for layer in self._decoder.layers):
            none = torch.zeros(2, positions.numel(), pairs[0].shape[-1] if pairs else self._decoder.width)
            none[0] = 1
            pairs.append(none)
        return torch.stack(pairs, 1)

    def _is_static(self) -> bool:
        kinds = getattr(self._model.rotary_emb, "rope_type", "default")
        return all(kind in STATIC for kind in (kinds.values() if isinstance(kinds, dict) else (kinds,)))

    def _built(self) -> ctypes.Structure:
        library, decoder = kernels.library(), self._decoder
        rotations = decoder.rotations
        layers = (library.Layer * len(decoder.layers))()
        for structure, layer in zip(layers, decoder.layers, strict=True):
            for name in NORMS:
                norm = layer.norms.get(name)
                setattr(structure, name, library.OptionalNorm(self._norm(norm), norm is None))
            for name, linear in layer.linears.items():
                setattr(structure, name, self._product(linear))
            structure.window = layer.window
            structure.rotation = rotations.index(layer.rotation) if layer.rotates else len(rotations)
        self._kept.append(layers)
        width = self._turned(torch.zeros(1, 1, decoder.hidden), torch.zeros(1, 1, dtype=torch.long)).shape[-1]
        model: ctypes.Structure = library.Model(
            layers, len(layers), decoder.hidden, decoder.heads, decoder.key_heads, decoder.width, width,
            decoder.attention_scale, decoder.attention_cap, decoder.residual_scale, decoder.activation,
            decoder.whole_norms, self._norm(decoder.last),
        )  # fmt: skip
        return model

    def _norm(self, norm: NormOf | None) -> Any:
        if norm is None:
            return kernels.library().Norm(None, 0.0, 0.0)
        self._kept.append(norm.weight)
        return kernels.library().Norm(norm.weight.data_ptr(), norm.epsilon, norm.extra)

    def _product(self, linear: RepackedLinear) -> Any:
        structure, bias = kernels.weight_struct(linear.packed), linear.bias
        self._kept += [structure, linear.packed, bias]
        return kernels.library().Product(ctypes.addressof(structure), None if bias is None else bias.data_ptr())


class Watched:
    """The modules inside a decoder. Asked for every token, so that the loops are the interpreter's own."""

    def __init__(self, model: Any) -> None:
        found = [(each._modules, name, child) for each in model.modules() for name, child in each._modules.items()]
        self._holders, self._names, self._modules = zip(*found, strict=True)
        modules = [child for child in self._modules if child is not None]
        self._hooks = [hooks for each in modules for hooks in (each._forward_hooks, each._forward_pre_hooks)]
        self._hooks += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        self._own = [each.__dict__ for each in modules]

    def are_as_they_were(self) -> bool:
        """Whether none was replaced, and none has a hook, or accelerate's."""
        now = map(dict.get, self._holders, self._names)
        return not any(self._hooks) and all(map(is_, now, self._modules)) and not any(map(HOOKED, self._own))


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
    def of(cls, cache: Any, texts: int, layers: int) -> Held | None:
        """Those of a cache of so many layers; None where one of them is not of the plain kinds."""
        rooms = [room for layer in cache.layers if (room := _room_of(layer, texts)) is not None]
        if not len(rooms) == len(cache.layers) == layers:
            return None
        return cls(cache.layers, rooms, texts, cache.get_seq_length())

    def takes(self, texts: int) -> bool:
        """Whether each layer can take one position more, of so many texts."""
        return texts == self._texts and self._written < self._left

    def grow(self) -> None:
        """A step has written the next position; layers with a window let go of the oldest."""
        self.seen, self._written = self.seen + 1, self._written + 1
        self._held += 1
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

    def __init__(self, layer: Any) -> None:
        texts, heads, self.held, width = layer.keys.shape
        self.start, self.size = 0, self.held + SPARE
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

    def is_of(self, layer: Any) -> bool:
        """Whether it holds what the layer does, and can take one position more."""
        return layer.keys is self.keys and layer.values is self.values and self.left > 0

    def fields(self) -> tuple[int, int, int, int]:
        """As the kernels take it."""
        return self.keys.data_ptr(), self.values.data_ptr(), self.size, self.held

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


def _room_of(layer: Any, texts: int) -> Room | None:
    """A layer's keys and values with room for one more position; None for a layer that is not of the plain kinds."""
    if type(layer).__name__ not in ("DynamicLayer", "DynamicSlidingWindowLayer") or not layer.is_initialized:
        return None
    keys = layer.keys
    if keys.dim() != 4 or len(keys) != texts or keys.dtype != torch.float32 or keys.device.type != "cpu":
        return None
    if keys.shape != layer.values.shape or getattr(layer, "record_past", False) or (
        getattr(layer, "sliding_window", 2) < 2):  # fmt: skip
        return None
    room: Room | None = layer.__dict__.get("_room")
    if room is None or not room.is_of(layer):
        room = layer.__dict__["_room"] = Room(layer)
    return room
