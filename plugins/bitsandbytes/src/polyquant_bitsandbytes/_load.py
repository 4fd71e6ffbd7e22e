"""Loads models through transformers' bitsandbytes path. The only file that imports torch and the library."""

from __future__ import annotations

import logging
from typing import Any

import bitsandbytes
import torch
from bitsandbytes import cextension
from polyquant import hf
from polyquant.loaded import LoadedModel
from polyquant.options import resolved_dtype
from polyquant.request import LoadRequest
from polyquant.types import Problem

from polyquant_bitsandbytes.options import BitsAndBytesOptions


def native_problems(device: str) -> list[Problem]:
    """The native library of bitsandbytes that this torch build needs, where it could not be loaded."""
    error = getattr(cextension.lib, "formatted_error", None)
    if error is None or device.startswith(("cpu", "xpu")):
        return []  # bitsandbytes itself runs without it there, in plain torch
    what = f"bitsandbytes {bitsandbytes.__version__} has no native library for CUDA {torch.version.cuda}"
    fix = "pip install --upgrade bitsandbytes, or set BNB_CUDA_VERSION to a packaged one; python -m bitsandbytes tells which"
    return [Problem(what=what, fix=fix, kind="native", detail=str(error))]


def load(request: LoadRequest, config: BitsAndBytesOptions) -> LoadedModel:
    dtype = resolved_dtype(config)
    model = hf.load_causal_lm(request, dtype, config.native())
    notes = []
    if config.bits == 8 and dtype != "float16":
        notes.append(f"LLM.int8 casts its inputs from {dtype} to float16 inside each layer")
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_drop_cast_warning)
    tokenizer = hf.load_tokenizer(request.source, trust_remote_code=request.trust_remote_code)
    return LoadedModel(model=model, tokenizer=tokenizer, config=config, kernel=kernel(request.device), notes=notes)


def kernel(device: str) -> str:
    """What multiplies: the native library, or bitsandbytes' plain torch fallback."""
    native = getattr(cextension.lib, "formatted_error", None) is None
    return f"bitsandbytes {device.partition(':')[0]}" if native else "bitsandbytes in plain torch"


def _drop_cast_warning(record: logging.LogRecord) -> bool:
    """Said once, as a note of the load, instead of once a layer."""
    return "inputs will be cast from" not in record.getMessage()


def prepare_for_training(loaded: LoadedModel) -> Any:
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(loaded.model)
