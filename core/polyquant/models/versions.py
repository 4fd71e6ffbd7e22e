"""What differs between the versions of transformers that polyquant supports (4.51 to the newest 5.x).

Everything else in the core, and every plugin, calls these names and never asks for a version.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from packaging.version import Version

from polyquant.errors import ModelError
from polyquant.request import ModelSource
from polyquant.support.cache import cache_folder
from polyquant.support.files import once
from polyquant.support.libraries import quiet_imports

with quiet_imports():
    import transformers
    import transformers.quantizers.auto  # it imports every quantization library that is installed

VERSION_5 = Version(transformers.__version__) >= Version("5.0.0.dev0")
QuantizedLayer: Any = getattr(importlib.import_module("transformers.cache_utils"), "QuantizedLayer", object)
"""A layer of a key-value cache that keeps codes; `object` before 4.56, where there is none to derive from."""


def dtype_argument(dtype: Any) -> dict[str, Any]:
    """`from_pretrained`'s dtype argument: `dtype` since 4.56, `torch_dtype` before."""
    return {"dtype" if Version(transformers.__version__) >= Version("4.56.0") else "torch_dtype": dtype}


def takes_loops(model: Any) -> bool:
    """Whether `generate` takes a function as its custom_generate; before 4.56 it takes a repository's name alone."""
    return hasattr(model, "_extract_generation_mode_kwargs")


def tied_tensors(model: Any) -> dict[str, str]:
    """Tensor name -> the tensor it is tied to."""
    if VERSION_5:
        return dict(model.all_tied_weights_keys)
    if not model.config.get_text_config().tie_word_embeddings or model.get_output_embeddings() is None:
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return {f"{names[id(head)]}.weight": f"{names[id(embedding)]}.weight"}


def class_ties(model_class: Any) -> dict[str, str]:
    """Names of tensors that the class ties where its config says so -> the tensor each is tied to; before 5 no class
    says to what: it is the embedding of a causal language model."""
    tied = model_class._tied_weights_keys or {}
    return (
        dict(tied)
        if isinstance(tied, dict)
        else dict.fromkeys(tied, f"{model_class.base_model_prefix}.embed_tokens.weight")
    )


def kept_in_float32(model: Any, dtype: str) -> Callable[[str], bool]:
    """Whether transformers keeps the tensor of that name in float32 where the model is loaded in `dtype`."""
    parts: set[str] = set()
    if dtype == "float16":
        parts |= set(model._keep_in_fp32_modules or ())
    if dtype in ("float16", "bfloat16"):
        parts |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return _naming(parts)


def never_quantized(model: Any) -> Callable[[str], bool]:
    """Whether transformers' quantizers leave the module of that tensor alone, since it is better off in float32."""
    return _naming(model._keep_in_fp32_modules or ())


def _naming(parts: Iterable[str]) -> Callable[[str], bool]:
    """Whether one of `parts` is found in a name, as transformers finds it."""
    if not parts:
        return lambda name: False
    between = ("", "") if VERSION_5 else (r"((^|\.)", r"($|\.))")
    pattern = re.compile("|".join(between[0] + part.replace("*", ".*") + between[1] for part in sorted(parts)))
    return lambda name: pattern.search(name) is not None


def untie(model: Any) -> None:
    """Give the output head a weight of its own, the embedding's as it is, so that each may become another."""
    import torch

    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    if VERSION_5:
        model.all_tied_weights_keys = {}


def default_dense_modules(model: Any) -> set[str]:
    """Names of the modules that transformers' quantizers keep dense unless told otherwise: the head and tied ones."""
    home = "transformers.quantizers.base" if VERSION_5 else "transformers.integrations.bitsandbytes"
    names = importlib.import_module(home).get_keys_to_not_convert(model)
    return {name.removesuffix(".weight") for name in names}


@contextmanager
def followed_on_meta() -> Iterator[None]:
    """Models can be run on the meta device. Before 5 they ask for its autocast, and experts for indices that depend on
    values: the one becomes the CPU's, the others are all of them."""
    if VERSION_5:
        yield
        return
    import torch
    from torch.fx.experimental import _config

    before = torch.autocast
    torch.autocast = lambda device_type, **more: before("cpu" if device_type == "meta" else device_type, **more)
    try:
        with _config.patch(meta_nonzero_assume_all_nonzero=True):
            yield
    finally:
        torch.autocast = before


class OldCacheLayer:
    """A layer of the key-value caches of transformers before 4.54, which have lists of keys and of values instead."""

    def __init__(self, cache: Any, index: int) -> None:
        self.keys, self.values = cache.key_cache[index], cache.value_cache[index]
        self.update = partial(cache.update, layer_idx=index)


def cache_layers(cache: Any) -> list[Any]:
    """The layers of a key-value cache, each with keys, values and update; none of a cache without any."""
    if hasattr(cache, "layers") or not hasattr(cache, "key_cache"):
        return list(getattr(cache, "layers", ()))
    return [OldCacheLayer(cache, index) for index in range(len(cache.key_cache))]


def empty_cache(config: Any) -> Any:
    """A key-value cache that grows; since 4.56 with layers as `config` has them."""
    if Version(transformers.__version__) >= Version("4.56.0"):
        return transformers.DynamicCache(config=config)
    return transformers.DynamicCache()


def is_filled(cache: Any) -> bool:
    """Whether a cache that a model was given holds something: tokens, or the states of linear attention."""
    try:
        return bool(cache.get_seq_length())
    except ValueError:  # no layer of it has tokens
        states = (value for layer in cache.layers for value in vars(layer).values())
        return any(hasattr(each, "untyped_storage") for value in states
                   for each in (value.values() if isinstance(value, dict) else (value,)))  # fmt: skip


@contextmanager
def progress_bars(enabled: bool) -> Iterator[None]:
    """Draw transformers' and the hub's progress bars only where `enabled`; what was set before comes back."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    before, gguf_bar = logging.is_progress_bar_enabled(), modeling_gguf_pytorch_utils.tqdm
    _set_progress_bars(enabled)
    modeling_gguf_pytorch_utils.tqdm = partial(gguf_bar, disable=not enabled)  # it does not ask the setting
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = gguf_bar
        _set_progress_bars(before)


def _set_progress_bars(enabled: bool) -> None:
    from transformers.utils import logging

    if enabled:
        logging.enable_progress_bar()
    else:
        logging.disable_progress_bar()


def forget_quantization(model: Any) -> None:
    """Make a model that was dequantized while loading saveable as the dense model it is."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    elif hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


@contextmanager
def savable(model: Any) -> Iterator[None]:
    """Within it a model that was loaded packed can be saved.

    transformers 5 undoes on saving what it did to the tensors on loading, and has no way back from the packed objects
    that a quantizer made; there is none needed: their state dict holds the parts that the checkpoint had.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        yield
        return
    model._weight_conversions = [each for each in conversions if _has_a_way_back(each)] or None
    try:
        yield
    finally:
        model._weight_conversions = conversions


def _has_a_way_back(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def readable(source: ModelSource) -> ModelSource:
    """`source` as the installed transformers reads it.

    5.x writes some settings under other names, which 4.x does not know and takes its defaults for. Before 5.0 such a
    checkpoint is read from a folder of the cache with the old names, and links to all other files. Raises ModelError
    for settings that 4.x has no name for.
    """
    if VERSION_5 or not source.config:
        return source
    path = source.path / "tokenizer_config.json"
    stored = json.loads(path.read_text()) if path.is_file() else {}
    config, tokenizer = _older_config(source), _older_tokenizer(stored)
    if config == source.config and tokenizer == stored:
        return source
    files = sorted(each for each in source.path.iterdir() if each.is_file())
    known = [str(source.path.absolute()), [(each.name, each.stat().st_size, each.stat().st_mtime_ns) for each in files]]
    folder = cache_folder() / "transformers-4" / hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]

    def write(out: Path) -> None:
        for each in files:
            (out / each.name).symlink_to(each.absolute())
        for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer)):
            (out / name).unlink(missing_ok=True)
            (out / name).write_text(json.dumps(content, indent=2))

    return msgspec.structs.replace(source, path=once(folder, write), config=config)


def unloaded(model: Any) -> Any:
    """The base of a PEFT model without the adapters; PEFT 0.15 leaves their config there, and then warns."""
    base = model.unload()
    vars(base).pop("peft_config", None)
    return base


def choosing_attention(config: Any) -> Any:
    """`config`, so that transformers chooses the attention kernel for it as for any other.

    4.51 writes into some checkpoints that the choice was made already, and not what it was: they then get the slowest.
    """
    if getattr(config, "_attn_implementation_autoset", False):
        config._attn_implementation_autoset = False
    return config


def _older_config(source: ModelSource) -> dict[str, Any]:
    """config.json with the names of transformers 4."""
    older: dict[str, Any] = deepcopy(dict(source.config))
    if older.get("quantization_config", {}) is None:  # the same as none
        del older["quantization_config"]
    for config in (older, older["text_config"]) if isinstance(older.get("text_config"), dict) else (older,):
        if "dtype" in config:
            config["torch_dtype"] = config.pop("dtype")
        rope = config.pop("rope_parameters", None)
        if not isinstance(rope, dict):
            continue
        if any(isinstance(value, dict) for value in rope.values()):
            raise ModelError(
                f"{source.name}: it has rotary embeddings of several kinds ({', '.join(rope)}), as transformers 5 "
                f"writes them, and transformers {transformers.__version__} reads one; use a newer one"
            )
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in rope:
                config[name] = rope[name]
        scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
        config["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    return older


def _older_tokenizer(stored: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with the names of transformers 4."""
    older = dict(stored)
    if older.get("tokenizer_class") == "TokenizersBackend":
        older["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(older.get("extra_special_tokens"), list):
        older["additional_special_tokens"] = older.pop("extra_special_tokens")
    return older
