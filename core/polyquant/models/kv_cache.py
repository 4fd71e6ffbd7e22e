"""A key-value cache of integer codes: a quantized layer as transformers has them, with the codes in plain torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from polyquant.errors import ConfigError
from polyquant.models import versions
from polyquant.request import KvCache

BITS = {"int8": 8, "int4": 4}
GROUP = 64  # codes that share a scale and a minimum, along a head; less where 64 does not divide a head's size
RESIDUAL = 128  # newest tokens at most, less one, that wait in full until they are quantized together


class Codes(NamedTuple):
    """Keys or values of one layer: code * scale + minimum, computed in float32."""

    codes: Tensor  # uint8 (batch, heads, tokens, head size); of 4 bits two in a byte, the even one low
    scale: Tensor  # compute dtype (batch, heads, tokens, groups)
    minimum: Tensor  # as scale
    size: int  # of a head

    def of_each(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """With each tensor changed alike."""
        return Codes(change(self.codes), change(self.scale), change(self.minimum), self.size)

    def followed_by(self, later: Codes) -> Codes:
        """With the tokens of `later` after these."""
        codes, scale, minimum = (torch.cat(pair, dim=2) for pair in zip(self[:3], later[:3], strict=True))
        return Codes(codes, scale, minimum, self.size)


class CodedLayer(versions.QuantizedLayer):  # type: ignore[misc]
    """Keys and values of one layer. A prompt is quantized when it has been read, later tokens RESIDUAL at a time.

    Each token is a group of its own or several: codes are made once, where transformers' own layers make all of them
    again with each flush; tokens and sequences are taken out as they are, for beam search and for what assisted
    decoding guessed wrong.
    """

    is_croppable = True

    def __init__(self, bits: int) -> None:
        super().__init__(nbits=bits, q_group_size=GROUP, residual_length=RESIDUAL)
        self._quantized_keys: Any = None
        self._quantized_values: Any = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in (batch, heads, tokens, head size) of each; all keys and values, of the same shape but for tokens."""
        self.cumulative_length += key_states.shape[-2]
        if self._quantized_keys is None:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self._quantized_keys, self._quantized_values = self._quantize(key_states), self._quantize(value_states)
            self.keys, self.values = _no_tokens(key_states), _no_tokens(value_states)
            return key_states, value_states
        keys, self._quantized_keys, self.keys = self._with(self._quantized_keys, self.keys, key_states)
        values, self._quantized_values, self.values = self._with(self._quantized_values, self.values, value_states)
        return keys, values

    def _with(self, quantized: Codes, waiting: Tensor, new: Tensor) -> tuple[Tensor, Codes, Tensor]:
        """All states, and what is kept of them: codes, and what still waits in full."""
        states = torch.cat([self._dequantize(quantized), waiting, new], dim=-2)
        waiting = torch.cat([waiting, new], dim=-2)
        if waiting.shape[-2] < self.residual_length:
            return states, quantized, waiting
        return states, quantized.followed_by(self._quantize(waiting)), _no_tokens(waiting)

    def _quantize(self, tensor: Tensor, axis: int = -1) -> Codes:
        """tensor: (batch, heads, tokens, head size). axis: transformers', of layouts that have several."""
        size = tensor.shape[-1]
        groups = tensor.unflatten(-1, (-1, _group_of(size)))
        minimum, maximum = groups.aminmax(dim=-1)
        scale = ((maximum.float() - minimum.float()) / (2**self.nbits - 1)).to(tensor.dtype)
        step = torch.where(scale == 0, torch.ones_like(scale), scale)  # of a group whose numbers are all one
        codes = (groups.float() - minimum.unsqueeze(-1).float()).div_(step.unsqueeze(-1)).round_()
        codes = codes.clamp_(0, 2**self.nbits - 1).to(torch.uint8).flatten(-2)
        if self.nbits == BITS["int4"]:
            pairs = torch.nn.functional.pad(codes, (0, size % 2)).unflatten(-1, (-1, 2))
            codes = pairs[..., 0] | (pairs[..., 1] << 4)
        return Codes(codes, scale, minimum, size)

    def _dequantize(self, quantized: Codes) -> Tensor:
        codes, scale, minimum, size = quantized
        if self.nbits == BITS["int4"]:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., :size]
        groups = codes.unflatten(-1, (-1, _group_of(size))).float()
        groups = groups.mul_(scale.unsqueeze(-1)).add_(minimum.unsqueeze(-1))
        return groups.flatten(-2).to(scale.dtype)

    def fullest(self, tokens: int) -> CodedLayer:
        """A layer of this one's shapes with so many tokens, of which as many are in full as ever are."""
        other, waiting = CodedLayer(self.nbits), min(tokens, RESIDUAL) - 1
        for count in (tokens - waiting, waiting):
            kept = (self._quantized_keys, self._quantized_values)
            shapes = ((*each.codes.shape[:2], count, each.size) for each in kept)
            other.update(*(each.scale.new_empty(shape) for each, shape in zip(kept, shapes, strict=True)))
        return other

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change_all(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_all(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change_all(lambda tensor: tensor[indices, ...])

    def crop(self, tokens: int) -> None:
        """Take the newest -tokens tokens out; of a positive number, as before transformers 5, keep so many."""
        removed = -tokens if tokens < 0 else max(0, self.cumulative_length - tokens) if tokens else 0
        if not removed or self._quantized_keys is None:
            return
        self.cumulative_length -= removed
        if of_residual := min(removed, self.keys.shape[-2]):
            self.keys, self.values = (kept[..., :-of_residual, :].clone() for kept in (self.keys, self.values))
        if of_codes := removed - of_residual:
            shorter = (kept.of_each(lambda tensor: tensor[..., :-of_codes, :].clone())
                       for kept in (self._quantized_keys, self._quantized_values))  # fmt: skip
            self._quantized_keys, self._quantized_values = shorter

    def _change_all(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._quantized_keys is None:
            return
        self._quantized_keys = self._quantized_keys.of_each(change)
        self._quantized_values = self._quantized_values.of_each(change)
        self.keys, self.values = change(self.keys), change(self.values)


def _no_tokens(like: Tensor) -> Tensor:
    """No tokens of states like these, in memory of their own."""
    return like.new_empty((*like.shape[:-2], 0, like.shape[-1]))


def _group_of(size: int) -> int:
    """Codes in a group of a head of that size: the largest number up to GROUP that divides it."""
    return next(group for group in range(min(size, GROUP), 0, -1) if size % group == 0)


def new_cache(config: Any, kv_cache: KvCache) -> Any:
    """An empty cache for a model with that config, to be given to it as `past_key_values`."""
    cache = versions.empty_cache(config)
    if kv_cache == "keep":
        return cache
    return transformers.Cache(layers=[CodedLayer(BITS[kv_cache]) for _ in versions.cache_layers(cache)])


def refuse(name: str, kv_cache: KvCache, why: str) -> None:
    """Raises ConfigError where there is a reason why the model of that name cannot have such a cache."""
    if why:
        raise ConfigError(f"{name} cannot have kv_cache={kv_cache!r}: {why}; leave it out (kv_cache='keep')")


def obstacle(model: Any) -> str:
    """Why `model`, which may be on the meta device, cannot keep its keys and values as codes; empty where it can."""
    if versions.QuantizedLayer is object:
        return f"transformers 4.56 or newer is needed, and {transformers.__version__} is installed"
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return "it keeps a recurrent state, and no keys and values"
    layers = versions.cache_layers(versions.empty_cache(model.config))
    others = dict.fromkeys(_kind(layer) for layer in layers if type(layer) is not transformers.cache_utils.DynamicLayer)
    if others or not layers:
        kinds = ", ".join(others) or "keys and values where its config does not say"
        return f"only layers that keep keys and values of every token can be quantized, and it has {kinds}"
    return ""


def _kind(layer: Any) -> str:
    """What a layer of a cache keeps, in words."""
    name = type(layer).__name__
    if getattr(layer, "is_sliding", False):
        return "sliding windows"
    if "Linear" in name:
        return "recurrent states"
    return "layers that share another's" if name == "DummyLayer" else name


def require_filled(cache: Any, tokens: int, name: str) -> None:
    """Raises ConfigError where a model that was given a quantized cache keeps something else after `tokens` tokens."""
    layers = versions.cache_layers(cache)
    without = [index for index, layer in enumerate(layers)
               if not isinstance(layer, CodedLayer) or layer.get_seq_length() != tokens]  # fmt: skip
    if without or not layers:
        where = f"layers {', '.join(map(str, without[:5]))} of {len(layers)} do" if layers else "it does"
        raise ConfigError(
            f"{name} was given a quantized key-value cache, and {where} not keep its tokens there; leave it out "
            "(kv_cache='keep')"
        )
