"""Models through transformers: config, skeleton, tokenizer. Imports torch, so nothing light imports it."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from polyquant.errors import ModelError
from polyquant.models import versions
from polyquant.options import Dtype
from polyquant.request import ModelSource


def read_config(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """The model's transformers config.

    Raises ModelError where it needs remote code that was not allowed, or is not a causal language model.
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
    except Exception as error:
        raise ModelError(f"{source.name}: transformers cannot read its config: {error}") from error
    config = versions.choosing_attention(config)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not needs_code:
        raise ModelError(
            f"{source.name} is not a causal language model: its architecture {config.model_type!r} "
            "has no causal language model class in transformers"
        )
    return config


@lru_cache(maxsize=4)
def _config(path: Path, gguf_file: str, trust_remote_code: bool, size: int, mtime_ns: int) -> Any:
    """size, mtime_ns: of the file, so that one that was changed is read again. Reading a GGUF's takes seconds."""
    gguf = {"gguf_file": gguf_file} if gguf_file else {}
    return AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code, **gguf)


def skeleton(source: ModelSource, dtype: Dtype, *, trust_remote_code: bool = False) -> Any:
    """The model's modules on the meta device: shapes and names without a byte of weights."""
    config = read_config(source, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, **versions.dtype_argument(getattr(torch, dtype))
            )
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise ModelError(f"{source.name}: transformers makes no model of its config: {why}") from error


def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer. Raises ModelError where there is none."""
    source = versions.readable(source)
    gguf = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    try:
        return AutoTokenizer.from_pretrained(str(source.path), trust_remote_code=trust_remote_code, **gguf)
    except Exception as error:
        raise ModelError(f"{source.name}: no tokenizer that transformers can read ({error})") from error
