"""What a context takes beside the weights: the key-value cache and the activations of a prefill.

Both are read off a forward pass of the model on the meta device: transformers' own cache classes say what each kind of
layer keeps (grouped queries, sliding windows, latent attention, recurrent states), and a count of the tensors that
live at once says what the pass needs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from polyquant.models import versions
from polyquant.models.generation import beginning, run
from polyquant.models.kv_cache import CodedLayer
from polyquant.request import KvCache

PROBED_TOKENS = 8  # recurrent layers of some models run a loop over tokens; memory grows in proportion


class Context(NamedTuple):
    """Bytes for a batch of contexts."""

    kv_cache_bytes: int  # where codes are kept, with as many tokens as it ever has in full
    activation_bytes: int  # at the fullest moment of a prefill of the whole context, the cache left out
    code_bytes: int = 0  # part of kv_cache_bytes that is the same in every compute dtype


def context_memory(skeleton: Any, context: int, batch: int, kv_cache: KvCache = "keep") -> Context | None:
    """What `batch` contexts of `context` tokens take; None for a model whose forward pass needs real numbers.

    skeleton: a causal language model on the meta device, in its compute dtype.
    """
    for module in skeleton.modules():
        if isinstance(getattr(module, "rope_type", None), str):
            module.rope_type = "default"  # others look at token positions; they change no shape
    tokens = min(context, PROBED_TOKENS)
    ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
    model = skeleton.eval().base_model
    try:
        with torch.inference_mode(), versions.followed_on_meta(), _Live(skeleton) as live:
            _, state = run(model, ids, beginning(model, kv_cache))
            peak = live.peak_bytes
        cache = state.value if state else None
        probed = _cache_bytes(cache)
        with torch.inference_mode():
            _extend(cache, context - tokens)
    except Exception:  # of the model's own code, on tensors without values
        return None
    codes = sum(tensor.nbytes for tensor in _tensors(cache, set()) if not tensor.is_floating_point())
    return Context(_cache_bytes(cache), max(0, peak - probed) * context // tokens, codes)


def _extend(cache: Any, tokens: int) -> None:
    """Let each layer that grows take `tokens` more, as its own class keeps them; codes: at their fullest."""
    for index, layer in enumerate(versions.cache_layers(cache)):
        if isinstance(layer, CodedLayer):
            cache.layers[index] = layer.fullest(layer.get_seq_length() + tokens)
            continue
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if tokens and isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor) and keys.dim() == 4:
            layer.update(_longer(keys, tokens, 2), _longer(values, tokens, 2))
        indexer = getattr(layer, "indexer_keys", None)
        if tokens and isinstance(indexer, torch.Tensor):
            layer.update_indexer(_longer(indexer, tokens, 1))


def _longer(like: torch.Tensor, tokens: int, dimension: int) -> torch.Tensor:
    shape = list(like.shape)
    shape[dimension] = tokens
    return like.new_empty(shape)


def _cache_bytes(cache: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(cache, set()))


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Meta tensors in attributes, lists and dictionaries; they all have one address, so storages say nothing."""
    if id(value) in seen or isinstance(value, (str, int, float, type, torch.dtype, torch.device)):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        if value.device.type == "meta" and value.dim() > 0:
            yield value
    elif isinstance(value, dict):
        for child in value.values():
            yield from _tensors(child, seen)
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from _tensors(child, seen)
    elif isinstance(value, CodedLayer) or hasattr(value, "layers") or type(value).__module__.endswith("cache_utils"):
        for child in vars(value).values():
            yield from _tensors(child, seen)


class _Live(TorchDispatchMode):  # type: ignore[misc]
    """Counts the bytes of tensors that operations made and that are still in use."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        held = (*model.parameters(), *model.buffers())  # views of these cost nothing
        self.known = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, torch.Tensor):
                self._add(made)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        nbytes = storage.nbytes()
        self.known.add(key)
        self.live_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._drop, key, nbytes)

    def _drop(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.live_bytes -= nbytes
