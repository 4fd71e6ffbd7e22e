"""A decode step, or a prompt, as one call of the kernels, behind the unchanged `forward` of a transformers decoder.

Python's own share of a step is 17 ms in a model of 30 layers, in which the kernels make three; of a prompt, torch's
attention and what it writes to memory between products take as long as the products. What is not known to be the plain
case (masks, hooks, adapters, other caches, gradients) goes the usual way. Imports torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from copy import deepcopy
from functools import update_wrapper
from inspect import signature
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from polyquant.packed_weights import kernels
from polyquant.packed_weights.agreement import agree
from polyquant.packed_weights.decoder import Decoder, NormOf, decoder_of
from polyquant.packed_weights.format import ROWS
from polyquant.packed_weights.held import Held, begin, new_cache
from polyquant.packed_weights.linear import RepackedLinear, most_inputs
from polyquant.packed_weights.watched import Watched

MOST_TEXTS = 4
AT_ONCE = 512  # tokens of a prompt, so that what is kept between products stays small
KNOWN = (
    "input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "cache_position", "return_dict",
    "tokenizer",
)  # fmt: skip
"""What a decoder may be given; `generate` passes a tokenizer on, which none reads."""
STATIC = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embeddings whose angles depend on nothing but the position."""
TURNED = 64  # positions whose cosines and sines are computed at once
NORMS = ("before_attention", "query_norm", "key_norm", "after_attention", "before_mlp", "after_mlp")


def attach(model: Any) -> bool:
    """Let the kernels make the steps of a causal language model. Whether they do.

    Its decoder's `forward` is replaced on the object; where what it answers does not `agree`, it is left alone.
    """
    if kernels.library() is None or not hasattr(model, "get_decoder") or not hasattr(DynamicCache(), "layers"):
        return False
    inner = model.get_decoder()
    known = None if inner is model else decoder_of(inner)
    if known is None:
        return False
    step = DecodeStep(inner, known)
    if not agree(inner, step):
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
        linears = (linear for layer in decoder.layers for linear in layer.linears.values())
        self._most = min(most_inputs(linear.packed, "int16") for linear in linears)  # more go the usual way

    def answer(self, given: Mapping[str, Any]) -> Any:
        """The decoder's output for the next tokens of each text; None where it is not the plain case."""
        ids: Any = given.get("input_ids")
        cache: Any = given.get("past_key_values")
        if cache is None:
            cache = new_cache(self._model.config, given.get("use_cache"))
        held = self._plain(given, ids, cache)
        if held is None:
            return None
        positions, (texts, tokens) = given.get("position_ids"), ids.shape
        if positions is None:
            positions = torch.arange(held.seen, held.seen + tokens)[None]
        embedded = self._model.embed_tokens(ids)
        hidden = (embedded * self._decoder.embedding_scale).contiguous()
        angles = self._angles(embedded, positions, texts)
        for start in range(0, tokens, AT_ONCE):
            some = slice(start, min(tokens, start + AT_ONCE))
            hidden[:, some] = self._stepped(held, hidden[:, some].contiguous(), angles[:, :, :, some].contiguous())
        if cache not in self.late:
            self.show(cache)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)

    def _stepped(self, held: Held, hidden: Tensor, angles: Tensor) -> Tensor:
        """hidden, (texts, tokens, hidden), after all layers and the last norm, in its place."""
        texts, tokens = hidden.shape[:2]
        status = kernels.functions().pq_step(
            ctypes.byref(self._structure), held.address, hidden.data_ptr(), texts, tokens, angles[0].data_ptr(),
            angles[1].data_ptr(), kernels.ACTIVATIONS["int16"], torch.get_num_threads(),
        )  # fmt: skip
        kernels.require(status)
        held.grow(tokens)
        return hidden

    def show(self, cache: Any) -> None:
        """Have a cache's layers show what steps have written; see `Forward.show`."""
        self.late.discard(cache)
        if (held := self._held.pop(cache, None)) is not None:
            held.show()

    def _plain(self, given: Mapping[str, Any], ids: Any, cache: Any) -> Held | None:
        """The cache's keys and values with room for the tokens; None, all of it shown, where it goes the usual way."""
        if type(cache) is not DynamicCache:
            return None
        held = self._held.get(cache)
        seen = cache.get_seq_length() if held is None else held.seen
        is_plain = self._is_plain(given, ids) and self._follow(given.get("position_ids"), ids, seen)
        if held is not None and not (is_plain and held.takes(*ids.shape)):
            self._held.pop(cache).show()
            held = None
        if is_plain and held is None:
            decoder, (texts, tokens) = self._decoder, ids.shape
            layers = len(decoder.layers)
            begin(cache, texts, layers, decoder.key_heads, decoder.width)
            held = Held.of(cache, texts, layers, tokens)
            if held is not None:
                self._held[cache] = held
        return held

    def _follow(self, positions: Any, ids: Tensor, seen: int) -> bool:
        """Whether several tokens are the next ones, and of a decoder whose prompts the kernels make, and so fast."""
        tokens = ids.shape[1]
        if tokens == 1:
            return True
        following = positions is None or bool((positions == torch.arange(seen, seen + tokens)).all())
        return following and self._decoder.width % ROWS == 0 and ids.numel() <= self._most

    def _is_plain(self, given: Mapping[str, Any], ids: Any) -> bool:
        """Whether these are tokens of a few texts, all of whose earlier ones are seen, and nothing else."""
        model, mask = self._model, given.get("attention_mask")
        return (
            isinstance(ids, Tensor)
            and ids.dim() == 2
            and ids.shape[1] > 0
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
        """Cosines and sines, (2, rotations, texts, tokens, width), from the model's own module."""
        if positions.numel() == 1 and self._is_static():
            position, (first, table) = int(positions[0, 0]), self._table
            if not 0 <= position - first < TURNED or first < 0:
                first = position // TURNED * TURNED
                table = self._turned(like, torch.arange(first, first + TURNED)[None])
                self._table = first, table
            angles = table[:, :, position - first : position - first + 1]
        else:
            angles = self._turned(like, positions)
        return angles.unflatten(2, positions.shape).expand(-1, -1, texts, -1, -1)

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
