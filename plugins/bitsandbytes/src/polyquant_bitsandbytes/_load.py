"""Loads models through transformers' bitsandbytes path. The only file that imports torch and the library."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import bitsandbytes
import torch
from bitsandbytes import cextension
from polyquant.errors import ConfigError, SaveError
from polyquant.plugin import LoadedModel, LoadRequest, Problem, checkpoints, resolved_dtype

from polyquant_bitsandbytes.options import BitsAndBytesOptions


def native_problems(device: str) -> list[Problem]:
    """The native library of bitsandbytes that this torch build needs, where it could not be loaded."""
    error = _native_error()
    if error is None or device.startswith(("cpu", "xpu")):
        return []  # bitsandbytes itself runs without it there, in plain torch
    what = f"bitsandbytes {bitsandbytes.__version__} has no native library for CUDA {torch.version.cuda}"
    fix = "pip install --upgrade bitsandbytes, or set BNB_CUDA_VERSION to one that python -m bitsandbytes lists"
    return [Problem(what=what, fix=fix, kind="native", detail=error)]


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
    tokenizer = checkpoints.load_tokenizer(request.source, trust_remote_code=request.trust_remote_code)
    return LoadedModel(model=model, tokenizer=tokenizer, config=config, kernel=kernel(request.device), notes=notes)


def _load_model(request: LoadRequest, config: BitsAndBytesOptions) -> Any:
    require_offload(request, config)
    dtype = resolved_dtype(config)
    if not request.source.stored_quantization:
        return checkpoints.load_causal_lm(request, dtype, config.native())
    model = checkpoints.load_causal_lm(request, dtype)
    _cast_dense(model, getattr(torch, dtype))
    if config.bits == 4:  # transformers takes the stored compute dtype; the one asked for is a load-time option
        model.config.quantization_config.bnb_4bit_compute_dtype = getattr(torch, dtype)
        for module in _linear_4bit(model):
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


def _cast_dense(model: Any, dtype: torch.dtype) -> None:
    """Dense parameters of a stored checkpoint in `dtype`: transformers 5.23 leaves them in their stored one."""
    kept = tuple(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        packed = isinstance(parameter, (bitsandbytes.nn.Params4bit, bitsandbytes.nn.Int8Params))
        if not packed and parameter.is_floating_point() and not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(dtype)


def save(loaded: LoadedModel, out: Path) -> Path:
    """Weights that the CPU kernel has repacked have lost bits of their scales: those are read from the source again."""
    if not _repacked(loaded.model):
        return checkpoints.save_pretrained(loaded, out)
    return checkpoints.save_pretrained(loaded, out, _read_again(loaded))


def prepare_for_training(loaded: LoadedModel) -> Any:
    """Freeze, and let no forward pass repack weights: no gradient passes through those that are."""
    from peft import prepare_model_for_kbit_training

    if _repacked(loaded.model):
        exact = dict(_read_again(loaded).named_modules())
        for name, module in loaded.model.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                module.weight, module.quant_state = exact[name].weight, exact[name].weight.quant_state
    for module in _linear_4bit(loaded.model):
        module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(loaded.model, gradient_checkpointing_kwargs={"use_reentrant": False})


def _repacked(model: Any) -> bool:
    """Whether a forward pass has repacked weights for the CPU, which rounds their scales."""
    return any(getattr(module.weight.quant_state, "packing_format_for_cpu", False) for module in _linear_4bit(model))


def _read_again(loaded: LoadedModel) -> Any:
    """The model as it was loaded. Raises SaveError where it is not known from where."""
    if loaded.request is None:
        raise SaveError(
            "the first forward pass repacked the weights, and where they came from is unknown: load through polyquant"
        )
    return _load_model(loaded.request, cast(BitsAndBytesOptions, loaded.config))


def kernel(device: str) -> str:
    """What multiplies: the native library, or bitsandbytes' plain torch fallback."""
    return f"bitsandbytes {device.partition(':')[0]}" if _native_error() is None else "bitsandbytes in plain torch"


def _native_error() -> str | None:
    """Why bitsandbytes runs without its native library; None where it has it."""
    lib = cextension.lib
    return lib.formatted_error if isinstance(lib, cextension.ErrorHandlerMockBNBNativeLibrary) else None


def _linear_4bit(model: Any) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit))


def _repacks(model: Any) -> bool:
    """Whether the first forward pass is going to repack weights; layers of sizes that its kernel cannot take opt out.

    bitsandbytes 0.50 asserts out_features % 32 == 0 there and needs whole blocks along in_features.
    """
    found = False
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False) and module.weight.device.type == "cpu":
            fits = module.out_features % 32 == 0 and module.in_features % module.weight.blocksize == 0
            module.support_avx512bf16_for_cpu = fits
            found = found or fits
    return found


def _drop_cast_warning(record: logging.LogRecord) -> bool:
    """Said once, as a note of the load, instead of once a layer."""
    return "inputs will be cast from" not in record.getMessage()
