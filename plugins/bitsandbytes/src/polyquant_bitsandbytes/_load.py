"""Loads and saves models through transformers' bitsandbytes path."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from polyquant.errors import ConfigError
from polyquant.plugin import LoadedModel, LoadRequest, checkpoints, resolved_dtype

from polyquant_bitsandbytes._checks import require_sound
from polyquant_bitsandbytes._library import kernel, quantize_config
from polyquant_bitsandbytes._quantize import quantized_4bit
from polyquant_bitsandbytes.options import BitsAndBytesOptions


def load(request: LoadRequest, config: BitsAndBytesOptions) -> LoadedModel:
    model = _load_model(request, config)
    notes = []
    if config.bits == 8 and config.compute_dtype != "float16":
        notes.append(f"LLM.int8 casts its inputs from {config.compute_dtype} to float16 inside each layer")
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_drop_cast_warning)
    _keep_as_stored(model)
    return LoadedModel(model=model, config=config, kernel=kernel(request.device), notes=notes)


def _load_model(request: LoadRequest, config: BitsAndBytesOptions) -> Any:
    require_offload(request, config)
    dtype = resolved_dtype(config)
    if not request.source.stored_quantization:
        rounded = quantized_4bit if config.bits == 4 else None
        return checkpoints.load_causal_lm(request, dtype, quantize_config(config), rounded)
    require_sound(request, config)
    model = checkpoints.load_causal_lm(request, dtype)
    _cast_dense(model, checkpoints.dense_dtypes(request))
    if config.bits == 4:  # transformers takes the stored compute dtype; the one asked for is a load-time option
        model.config.quantization_config.bnb_4bit_compute_dtype = getattr(torch, dtype)
        for module in linear_4bit(model):
            module.compute_dtype = getattr(torch, dtype)
    return model


def require_offload(request: LoadRequest, config: BitsAndBytesOptions) -> None:
    """Raises ConfigError where modules go to the CPU beside another device without `fp32_offload`."""
    devices = {str(device) for device in request.device_map.values()}
    if devices & {"cpu", "disk"} and devices != {"cpu"} and not config.fp32_offload:
        raise ConfigError(
            f"the device map uses {', '.join(sorted(devices))}, and bitsandbytes does not quantize what it offloads; "
            "accept float32 there with fp32_offload=True, or keep the model on one kind of device"
        )


def _cast_dense(model: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    """Dense parameters of a stored checkpoint in their dtypes: transformers 5.23 leaves them in their stored one."""
    for name, parameter in model.named_parameters():
        packed = isinstance(parameter, (bitsandbytes.nn.Params4bit, bitsandbytes.nn.Int8Params))
        if not packed and parameter.is_floating_point() and name in dtypes:
            parameter.data = parameter.data.to(dtypes[name])


def save(loaded: LoadedModel, out: Path) -> Path:
    return checkpoints.save_pretrained(loaded, out)


def linear_4bit(model: Any) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit))


def _keep_as_stored(model: Any) -> None:
    """Let no forward pass repack 4-bit weights, as bitsandbytes 0.50 does on processors with AVX512-BF16.

    That rounds scales and activations to bfloat16, whatever the compute dtype, and state_dict() of such a model leaves
    it with wrong weights.
    """
    for module in linear_4bit(model):
        module.support_avx512bf16_for_cpu = False


def _drop_cast_warning(record: logging.LogRecord) -> bool:
    """Said once, as a note of the load, instead of once a layer."""
    return "inputs will be cast from" not in record.getMessage()
