"""Loads and saves models through transformers' bitsandbytes path."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import bitsandbytes
import torch
from polyquant.errors import ConfigError, SaveError
from polyquant.plugin import LoadedModel, LoadRequest, checkpoints, resolved_dtype

from polyquant_bitsandbytes._checks import require_sound
from polyquant_bitsandbytes._library import kernel, quantize_config
from polyquant_bitsandbytes.options import BitsAndBytesOptions


def load(request: LoadRequest, config: BitsAndBytesOptions) -> LoadedModel:
    model = _load_model(request, config)
    notes = []
    if config.bits == 8 and config.compute_dtype != "float16":
        notes.append(f"LLM.int8 casts its inputs from {config.compute_dtype} to float16 inside each layer")
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_drop_cast_warning)
    if _repacks(model):
        notes.append(
            "on this CPU the first forward pass repacks 4-bit weights for AVX512 and rounds their scales to bfloat16"
        )
    return LoadedModel(model=model, config=config, kernel=kernel(request.device), notes=notes)


def _load_model(request: LoadRequest, config: BitsAndBytesOptions) -> Any:
    require_offload(request, config)
    dtype = resolved_dtype(config)
    if not request.source.stored_quantization:
        return checkpoints.load_causal_lm(request, dtype, quantize_config(config))
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
    """Weights that the CPU kernel has repacked have lost bits of their scales: those are read from the source again."""
    if not repacked(loaded.model):
        return checkpoints.save_pretrained(loaded, out)
    return checkpoints.save_pretrained(loaded, out, read_again(loaded))


def repacked(model: Any) -> bool:
    """Whether a forward pass has repacked weights for the CPU, which rounds their scales."""
    return any(getattr(module.weight.quant_state, "packing_format_for_cpu", False) for module in linear_4bit(model))


def read_again(loaded: LoadedModel) -> Any:
    """The model as it was loaded. Raises SaveError where it is not known from where."""
    if loaded.request is None:
        raise SaveError(
            "the first forward pass repacked the weights, and where they came from is unknown: load through polyquant"
        )
    return _load_model(loaded.request, cast(BitsAndBytesOptions, loaded.config))


def linear_4bit(model: Any) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit))


def _repacks(model: Any) -> bool:
    """Whether the first forward pass is going to repack weights, for products in bfloat16.

    Layers opt out whose compute dtype is another, whose activations it would round unasked, and those of sizes that its
    kernel cannot take: bitsandbytes 0.50 asserts out_features % 32 == 0 there and needs whole blocks along in_features.
    """
    found = False
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False) and module.weight.device.type == "cpu":
            fits = module.out_features % 32 == 0 and module.in_features % module.weight.blocksize == 0
            module.support_avx512bf16_for_cpu = fits and module.compute_dtype == torch.bfloat16
            if module.support_avx512bf16_for_cpu:
                module.register_state_dict_pre_hook(_require_whole)
                found = True
    return found


def _require_whole(module: Any, *ignored: Any) -> None:
    """Raises SaveError where bitsandbytes would unpack the weights, and leave the scales of repacked ones behind."""
    if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
        raise SaveError(
            "the first forward pass repacked the weights, and state_dict() would leave the model with wrong ones "
            "(bitsandbytes 0.50): write it with loaded.save(DIR), or load it with compute_dtype='float32'"
        )


def _drop_cast_warning(record: logging.LogRecord) -> bool:
    """Said once, as a note of the load, instead of once a layer."""
    return "inputs will be cast from" not in record.getMessage()
