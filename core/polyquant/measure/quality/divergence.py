"""Distance of a candidate's next-token distribution from the reference's, position by position. Imports torch."""

from __future__ import annotations

from typing import Any

import torch


def kl_divergence(reference: Any, candidate: Any) -> Any:
    """KL(reference || candidate) of each position, in nats, over the whole vocabulary.

    reference, candidate: logits, (positions, vocabulary), any float dtype and device; computed in float32 on the
        reference's device.
    Returns (positions,), float32; zero up to rounding (1e-6) where both are the same, and never negative beyond that.
    Raises ValueError where the shapes differ or are not two-dimensional.
    Same definition as llama.cpp's perplexity tool (--kl-divergence).
    """
    _check_shapes(reference, candidate)
    log_reference = torch.log_softmax(reference.float(), dim=-1)
    log_candidate = torch.log_softmax(candidate.to(reference.device).float(), dim=-1)
    return (log_reference.exp() * (log_reference - log_candidate)).sum(dim=-1)


def top1_agreement(reference: Any, candidate: Any) -> Any:
    """Whether both put the same token first, for each position.

    reference, candidate: logits, (positions, vocabulary), any float dtype and device.
    Returns (positions,), bool; the mean of it is the share that llama.cpp calls "same top p".
    Raises ValueError where the shapes differ or are not two-dimensional.
    """
    _check_shapes(reference, candidate)
    return reference.argmax(dim=-1) == candidate.to(reference.device).argmax(dim=-1)


def _check_shapes(reference: Any, candidate: Any) -> None:
    if reference.dim() != 2 or reference.shape != candidate.shape:
        raise ValueError(
            f"logits must have one shape (positions, vocabulary), got {tuple(reference.shape)} for the reference "
            f"and {tuple(candidate.shape)} for the candidate"
        )
