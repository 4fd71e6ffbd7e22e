"""The dense model itself: what quantized ones are compared with and adapters are merged into. Imports torch."""

from __future__ import annotations

from typing import Any

import torch

from polyquant.errors import OutOfMemory
from polyquant.loaded import LoadedModel
from polyquant.models import hf, versions
from polyquant.options import BackendOptions, Dtype
from polyquant.request import ModelSource
from polyquant.support.devices import available_devices


def load_dense(
    source: ModelSource, dtype: Dtype = "float32", device: str = "cpu", *, trust_remote_code: bool = False
) -> Any:
    """The dense model, in eval mode: what quantized ones are compared with.

    device: 'auto' for the fastest. trust_remote_code: run the checkpoint's own code, where it has some.
    Raises OutOfMemory where the device does not hold it, ModelError where it needs code that was not allowed.
    """
    where = available_devices()[0] if device == "auto" else device
    try:
        return _load_dense(source, dtype, trust_remote_code=trust_remote_code).to(where)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"the dense model does not fit {where} in {dtype}: take the CPU (--device cpu), or compare with another "
            "reference (--reference dense:bfloat16, or a backend that fits, such as bitsandbytes:int8)"
        ) from error


def _load_dense(source: ModelSource, dtype: Dtype, *, trust_remote_code: bool) -> Any:
    source = versions.readable(source)
    with versions.progress_bars(enabled=False):
        return hf.load_model(source, getattr(torch, dtype), trust_remote_code=trust_remote_code)


def as_loaded(model: Any, source: ModelSource, dtype: Dtype) -> LoadedModel:
    """A dense model of `source` with its tokenizer, in the form that backends give theirs."""
    config = BackendOptions(compute_dtype=dtype)
    return LoadedModel(model=model, tokenizer=hf.load_tokenizer(source), config=config, kernel="torch")
