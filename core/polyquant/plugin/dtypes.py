"""Which dtype each dense tensor is read and kept in. Imports torch."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast, get_args

import torch

from polyquant.errors import ModelError
from polyquant.models.headers import stored_tensors
from polyquant.options import Dtype
from polyquant.plugin.parts import is_finite
from polyquant.request import LoadRequest, ModelSource


def stored_dtype(source: ModelSource, otherwise: Dtype) -> Dtype:
    """The dtype that holds the checkpoint's tensors as they are; of pickles, what the config names, else `otherwise`.

    Beside float16 others mean float32: float16 has not their range. Beside bfloat16 it is what most bytes have.
    """
    sizes: Counter[Dtype] = Counter()
    for tensor in stored_tensors(source).values():
        if tensor.dtype in get_args(Dtype):
            sizes[cast("Dtype", tensor.dtype)] += tensor.nbytes
    if sizes:
        return "float32" if len(sizes) > 1 and "float16" in sizes else sizes.most_common(1)[0][0]
    stored: Any = source.config.get("dtype") or source.config.get("torch_dtype")
    named: Dtype = stored if stored in get_args(Dtype) else otherwise
    return named


def dense_dtypes(request: LoadRequest) -> dict[str, torch.dtype]:
    """Of the model's dense tensors: the compute dtype, but for those that transformers keeps in another."""
    return {weight.name: getattr(torch, weight.dtype) for weight in request.weights}


def cast_dense(source: ModelSource, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A dense tensor in `dtype`. Raises ModelError where it holds numbers that this dtype does not."""
    narrowed = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and not is_finite(narrowed):
        largest, kind = float(tensor.abs().max()), str(dtype).removeprefix("torch.")
        raise ModelError(
            f"{source.name}: {name} holds {largest:.3g}, and {kind} ends at {torch.finfo(dtype).max:.3g}; "
            "load it with compute_dtype='bfloat16' or 'float32' (--compute-dtype), or, of an embedding or a head, with "
            "embeddings='keep' or head='keep'"
        )
    return narrowed
