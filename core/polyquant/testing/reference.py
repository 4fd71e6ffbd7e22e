"""Logits of the dense model, which quantized ones are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any


def reference_logits(model: str, tokens: Sequence[int]) -> Any:
    """Logits of the dense model in float32 on the CPU, (positions, vocabulary); computed once a process.

    model: as `polyquant.load` takes it.
    """
    return _logits(model, tuple(tokens))


def logits_by_transformers(checkpoint: Path, tokens: Sequence[int]) -> Any:
    """Logits of what transformers itself makes of a checkpoint, float32 on the CPU, (positions, vocabulary)."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, trust_remote_code=False)
    with torch.inference_mode():
        return model(torch.tensor([list(tokens)])).logits[0]


@lru_cache(maxsize=16)  # the real model's are 31 MB, and stay while tiny ones come and go
def _logits(model: str, tokens: tuple[int, ...]) -> Any:
    from polyquant.loading import dense
    from polyquant.models.generation import logits_of
    from polyquant.models.resolve import resolve_dense

    dense = dense.load_dense(resolve_dense(model))
    return logits_of(dense, tokens)
