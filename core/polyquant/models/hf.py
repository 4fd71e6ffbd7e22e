"""Models through transformers: config, skeleton, weights, tokenizer. Imports torch, so nothing light imports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from polyquant.errors import ModelError, OutOfMemory
from polyquant.loaded import LoadedModel
from polyquant.models import versions
from polyquant.options import BackendOptions, Dtype
from polyquant.request import LoadRequest, ModelSource
from polyquant.support.environment import available_devices


def read_config(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """The model's transformers config.

    Raises ModelError where it needs remote code that was not allowed, or is not a causal language model.
    """
    source = versions.readable(source)
    gguf = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    needs_code = "auto_map" in source.config and source.config.get("model_type") not in CONFIG_MAPPING
    if needs_code and not trust_remote_code:
        raise ModelError(
            f"{source.name} runs Python code of its own ({source.config['auto_map']}); "
            "read that code first, then allow it with trust_remote_code=True (--trust-remote-code)"
        )
    try:
        config = AutoConfig.from_pretrained(str(source.path), trust_remote_code=trust_remote_code, **gguf)
    except Exception as error:
        raise ModelError(f"{source.name}: transformers cannot read its config: {error}") from error
    config = versions.choosing_attention(config)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not needs_code:
        raise ModelError(
            f"{source.name} is not a causal language model: its architecture {config.model_type!r} "
            "has no causal language model class in transformers"
        )
    return config


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


def load_causal_lm(request: LoadRequest, dtype: Dtype, quantization_config: Any = None) -> Any:
    """`AutoModelForCausalLM.from_pretrained` as every backend on transformers' own path calls it, in eval mode."""
    source = request.source
    arguments: dict[str, Any] = versions.dtype_argument(getattr(torch, dtype))
    if quantization_config is not None:
        arguments["quantization_config"] = quantization_config
    if source.gguf_file:
        arguments["gguf_file"] = source.gguf_file
    if request.attention:
        arguments["attn_implementation"] = request.attention
    with versions.progress_bars(request.progress):
        model = AutoModelForCausalLM.from_pretrained(
            str(source.path),
            device_map=dict(request.device_map),
            trust_remote_code=request.trust_remote_code,
            use_safetensors=None if request.allow_pickle or source.gguf_file else True,
            local_files_only=True,
            **arguments,
        )
    return model.eval()


def load_dense(source: ModelSource, dtype: Dtype = "float32", device: str = "cpu") -> Any:
    """The dense model, in eval mode: what quantized ones are compared with.

    device: 'auto' for the fastest. Raises OutOfMemory where that does not hold it.
    """
    where = available_devices()[0] if device == "auto" else device
    try:
        return _load_dense(source, dtype).to(where)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"the dense model does not fit {where} in {dtype}: take the CPU (--device cpu), or compare with another "
            "reference (--reference dense:bfloat16, or a backend that fits, such as bitsandbytes:int8)"
        ) from error


def _load_dense(source: ModelSource, dtype: Dtype) -> Any:
    source = versions.readable(source)
    with versions.progress_bars(enabled=False):
        arguments = versions.dtype_argument(getattr(torch, dtype))
        return AutoModelForCausalLM.from_pretrained(source.path, local_files_only=True, **arguments).eval()


def as_loaded(model: Any, source: ModelSource, dtype: Dtype) -> LoadedModel:
    """A dense model of `source` with its tokenizer, in the form that backends give theirs."""
    config = BackendOptions(compute_dtype=dtype)
    return LoadedModel(model=model, tokenizer=load_tokenizer(source), config=config, kernel="torch")


def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer. Raises ModelError where there is none."""
    source = versions.readable(source)
    gguf = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    try:
        return AutoTokenizer.from_pretrained(str(source.path), trust_remote_code=trust_remote_code, **gguf)
    except Exception as error:
        raise ModelError(f"{source.name}: no tokenizer that transformers can read ({error})") from error


def save_pretrained(loaded: LoadedModel, out: Path, model: Any = None) -> Path:
    """Write `model`, or the loaded one, with its tokenizer, as transformers saves them."""
    with versions.progress_bars(loaded.request is not None and loaded.request.progress):
        (model or loaded.model).save_pretrained(out)
        loaded.tokenizer.save_pretrained(out)
    return out


def frozen_for_adapters(model: Any) -> Any:
    """`model` with its base frozen and activations recomputed in the backward pass: what `prepare_for_training` gives.

    PEFT's prepare_model_for_kbit_training does this too, and casts every 16-bit parameter to float32, which packed
    tensors of several libraries refuse.
    """
    model.requires_grad_(requires_grad=False)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model
