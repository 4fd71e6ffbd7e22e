"""Loads models through transformers' bitsandbytes path. The only file that imports torch and the library."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from bitsandbytes import cextension
from polyquant import hf
from polyquant.errors import SaveError
from polyquant.loaded import LoadedModel
from polyquant.options import resolved_dtype
from polyquant.request import LoadRequest
from polyquant.types import Problem

from polyquant_bitsandbytes.options import BitsAndBytesOptions


def native_problems(device: str) -> list[Problem]:
    """The native library of bitsandbytes that this torch build needs, where it could not be loaded."""
    error = _native_error()
    if error is None or device.startswith(("cpu", "xpu")):
        return []  # bitsandbytes itself runs without it there, in plain torch
    what = f"bitsandbytes {bitsandbytes.__version__} has no native library for CUDA {torch.version.cuda}"
    fix = "pip install --upgrade bitsandbytes, or set BNB_CUDA_VERSION to a packaged one; python -m bitsandbytes tells which"
    return [Problem(what=what, fix=fix, kind="native", detail=error)]


def load(request: LoadRequest, config: BitsAndBytesOptions) -> LoadedModel:
    dtype = resolved_dtype(config)
    model = hf.load_causal_lm(request, dtype, config.native())
    notes = []
    if config.bits == 8 and dtype != "float16":
        notes.append(f"LLM.int8 casts its inputs from {dtype} to float16 inside each layer")
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_drop_cast_warning)
    if _repacks(model):
        notes.append("on this CPU the first forward pass repacks 4-bit weights for AVX512 and rounds their scales to bfloat16")
    tokenizer = hf.load_tokenizer(request.source, trust_remote_code=request.trust_remote_code)
    return LoadedModel(model=model, tokenizer=tokenizer, config=config, kernel=kernel(request.device), notes=notes)


def save(loaded: LoadedModel, out: Path) -> Path:
    """Weights that the CPU kernel has repacked have lost bits of their scales: those are read from the source again."""
    repacked = any(getattr(state, "packing_format_for_cpu", False) for state in _quant_states(loaded.model))
    if repacked and loaded.request is None:
        raise SaveError("the first forward pass repacked the weights, and where they came from is unknown: load through polyquant")
    model = hf.load_causal_lm(loaded.request, resolved_dtype(loaded.config), loaded.config.native()) if repacked else loaded.model
    model.save_pretrained(out)
    loaded.tokenizer.save_pretrained(out)
    return out


def prepare_for_training(loaded: LoadedModel) -> Any:
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(loaded.model)


def kernel(device: str) -> str:
    """What multiplies: the native library, or bitsandbytes' plain torch fallback."""
    return f"bitsandbytes {device.partition(':')[0]}" if _native_error() is None else "bitsandbytes in plain torch"


def _native_error() -> str | None:
    """Why bitsandbytes runs without its native library; None where it has it."""
    lib = cextension.lib
    return lib.formatted_error if isinstance(lib, cextension.ErrorHandlerMockBNBNativeLibrary) else None


def _quant_states(model: Any) -> Iterator[Any]:
    return (module.weight.quant_state for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit))


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
