"""What bitsandbytes is here: its native library, and transformers' config of it."""

from __future__ import annotations

import bitsandbytes
import torch
from bitsandbytes import cextension
from polyquant.plugin import Problem
from transformers import BitsAndBytesConfig

from polyquant_bitsandbytes.options import BitsAndBytesOptions


def native_problems(device: str) -> list[Problem]:
    """The native library of bitsandbytes that this torch build needs, where it could not be loaded."""
    error = _native_error()
    if error is None or device.startswith(("cpu", "xpu")):
        return []  # bitsandbytes itself runs without it there, in plain torch
    what = f"bitsandbytes {bitsandbytes.__version__} has no native library for CUDA {torch.version.cuda}"
    fix = "pip install --upgrade bitsandbytes, or set BNB_CUDA_VERSION to one that python -m bitsandbytes lists"
    return [Problem(what=what, fix=fix, kind="native", detail=error)]


def kernel(device: str) -> str:
    """What multiplies: the native library, or bitsandbytes' plain torch fallback."""
    return f"bitsandbytes {device.partition(':')[0]}" if _native_error() is None else "bitsandbytes in plain torch"


def quantize_config(config: BitsAndBytesOptions) -> BitsAndBytesConfig:
    """The options as transformers takes them."""
    return BitsAndBytesConfig.from_dict(config.to_stored())


def _native_error() -> str | None:
    """Why bitsandbytes runs without its native library; None where it has it."""
    lib = cextension.lib
    return lib.formatted_error if isinstance(lib, cextension.ErrorHandlerMockBNBNativeLibrary) else None
