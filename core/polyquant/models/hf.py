"""Models through transformers: config, skeleton, tokenizer. Imports torch, so nothing light imports it."""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from polyquant.errors import ConfigError, ModelError
from polyquant.models import versions
from polyquant.models.fit import reporting, require_fit
from polyquant.models.gguf_config import config_of, require_as_stated
from polyquant.models.gguf_fields import described
from polyquant.models.gguf_header import read_header
from polyquant.models.headers import stored_tensors
from polyquant.options import Dtype
from polyquant.request import ModelSource

ATTENTIONS = ("sdpa", "eager", "flex_attention")
"""What needs no library of its own."""


def read_config(source: ModelSource, *, trust_remote_code: bool = False, stored: Collection[str] | None = None) -> Any:
    """The model's transformers config; it ties only tensors of which the checkpoint holds one.

    stored: names of the checkpoint's tensors, where its files are not those of `source`. Raises ModelError where it
    needs remote code that was not allowed, or is not a causal language model.
    """
    source = versions.readable(source)
    needs_code = "auto_map" in source.config and source.config.get("model_type") not in CONFIG_MAPPING
    if needs_code and not trust_remote_code:
        raise ModelError(
            f"{source.name} runs Python code of its own ({source.config['auto_map']}); "
            "read that code first, then allow it with trust_remote_code=True (--trust-remote-code)"
        )
    try:
        lone = source.path.is_file()  # a config.json without a model
        file = (source.path if lone else source.path / (source.gguf_file or "config.json")).stat()
        config = deepcopy(_config(source.path, source.gguf_file, trust_remote_code, file.st_size, file.st_mtime_ns))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{source.name}: transformers cannot read its config: {error}") from error
    config = versions.choosing_attention(config)
    if source.gguf_file:
        require_as_stated(source.name, read_header(source.path / source.gguf_file), config)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not needs_code:
        raise ModelError(
            f"{source.name} is not a causal language model: its architecture {config.model_type!r} "
            "has no causal language model class in transformers"
        )
    if not needs_code:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        _require_class(source, config, model_class)
        _untie_two(config, model_class, stored_tensors(source) if stored is None else stored)
    if getattr(config, "rescale_every", 0):
        config.rescale_every = 0  # RWKV would divide weights in place as it runs: packed ones, and what is saved then
    return config


def _require_class(source: ModelSource, config: Any, model_class: Any) -> None:
    """Raises ModelError where the checkpoint says that it is of another class than the one that it would load as."""
    named = source.config.get("architectures") or []
    known = [name for name in named if name in transformers.__all__]
    if known and model_class.__name__ not in named:
        raise ModelError(
            f"{source.name} is a {known[0]}, and would load as {model_class.__name__}, with the rest left out or made "
            "of random numbers; only causal language models are loaded: take a checkpoint of one"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{source.name} has an encoder beside its decoder; only causal language models are loaded: take one"
        )


def _untie_two(config: Any, model_class: Any, stored: Collection[str]) -> None:
    """The checkpoint decides: of two weights that are both there none is tied, whatever the config says.

    A packed one may have parts of other names; a bias is none of them.
    """
    homes = {name.rpartition(".")[0] for name in stored if not name.endswith(".bias")}
    ties = versions.class_ties(model_class)
    if any({name.rpartition(".")[0], other.rpartition(".")[0]} <= homes for name, other in ties.items()):
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False


@lru_cache(maxsize=4)
def _config(path: Path, gguf_file: str, trust_remote_code: bool, size: int, mtime_ns: int) -> Any:
    """size, mtime_ns: of the file, so that one that was changed is read again. Reading a GGUF's takes seconds."""
    if gguf_file:
        return config_of(path / gguf_file)
    return AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)


def ignored_tensors(source: ModelSource) -> list[str]:
    """Patterns of tensors that the model's class leaves out, such as those of layers for predicting several tokens."""
    known = source.config.get("model_type")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[known], None) if known in CONFIG_MAPPING else None
    return list(getattr(model_class, "_keys_to_ignore_on_load_unexpected", None) or ())


def skeleton(
    source: ModelSource, dtype: Dtype, *, trust_remote_code: bool = False, attention: str = "",
    stored: Collection[str] | None = None,
) -> Any:  # fmt: skip
    """The model's modules on the meta device: shapes and names without a byte of weights. stored: see `read_config`."""
    config = read_config(source, trust_remote_code=trust_remote_code, stored=stored)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    arguments = versions.dtype_argument(getattr(torch, dtype))
    if attention:
        arguments["attn_implementation"] = attention
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **arguments)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise ModelError(f"{source.name}: transformers makes no model of its config: {why}") from error


def load_model(source: ModelSource, dtype: Any, *, trust_remote_code: bool = False, **arguments: Any) -> Any:
    """The model as `AutoModelForCausalLM.from_pretrained` loads it, in eval mode: the one place that calls it.

    dtype: torch's. Raises ModelError, with the tensors' names, where transformers would put random numbers in the place
    of some, or leave some out.
    """
    config = read_config(source, trust_remote_code=trust_remote_code)
    more = {"gguf_file": source.gguf_file} if source.gguf_file else {"config": config}
    model, misfit = reporting(
        AutoModelForCausalLM.from_pretrained,
        str(source.path),
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        **versions.dtype_argument(dtype),
        **more,
        **arguments,
    )
    require_fit(source.name, misfit)
    return model.eval()


def require_attention(source: ModelSource, attention: str, *, trust_remote_code: bool = False) -> None:
    """Raises ConfigError, with the choices, where the model cannot have the attention implementation here."""

    def refused(name: str) -> ModelError | None:
        try:
            skeleton(source, "bfloat16", trust_remote_code=trust_remote_code, attention=name)
        except ModelError as error:
            return error
        return None

    if (error := refused(attention)) is None:
        return
    why = str(error.__cause__).rstrip(".")
    choices = " or ".join(f"attention={name!r}" for name in ATTENTIONS if refused(name) is None)
    if not choices:
        raise error
    raise ConfigError(
        f"{source.name}: it cannot have the attention {attention!r} here: {why}; use {choices}, or leave attention "
        "(--attention) out"
    ) from error


def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer. Raises ModelError where there is none."""
    source = versions.readable(source)
    gguf = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    try:
        if source.gguf_file and described(read_header(source.path / source.gguf_file)):
            # AutoTokenizer reads the config first, of an architecture that it does not know
            return PreTrainedTokenizerFast.from_pretrained(str(source.path), trust_remote_code=False, **gguf)
        return AutoTokenizer.from_pretrained(str(source.path), trust_remote_code=trust_remote_code, **gguf)
    except Exception as error:
        raise ModelError(f"{source.name}: no tokenizer that transformers can read ({error})") from error
