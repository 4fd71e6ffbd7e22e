"""How far a candidate's predictions are from the reference's, and how good both are at the text. Imports torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from polyquant.measure.quality.records import Quality

CHUNK_POSITIONS = 64  # compared at a time: 64 x 49152 float32 are 12 MiB


@dataclass
class Tally:
    """Adds up positions; holds five numbers for each, no logits."""

    kl: list[torch.Tensor] = field(default_factory=list)
    same_top: list[torch.Tensor] = field(default_factory=list)
    reference_nll: list[torch.Tensor] = field(default_factory=list)
    candidate_nll: list[torch.Tensor] = field(default_factory=list)
    windows: int = 0

    def add(self, reference: Any, candidate: Any, targets: Any) -> None:
        """A window.

        reference: log-probabilities, (positions, vocabulary), float32; candidate: logits of the same shape;
        targets: the tokens that follow, (positions,). Raises ValueError where the shapes differ, or for NaN.
        """
        if reference.shape != candidate.shape or reference.dim() != 2:
            raise ValueError(
                f"the reference has {tuple(reference.shape)} (positions, vocabulary), the candidate "
                f"{tuple(candidate.shape)}: not the same model or tokenizer"
            )
        for start in range(0, len(reference), CHUNK_POSITIONS):
            chunk = slice(start, start + CHUNK_POSITIONS)
            self._add(reference[chunk], torch.log_softmax(candidate[chunk].float(), dim=-1), targets[chunk])
        self.windows += 1

    def _add(self, reference: Any, candidate: Any, targets: Any) -> None:
        if not bool(candidate.isfinite().all()):
            raise ValueError("the candidate's logits are NaN or infinite")
        self.kl.append((reference.exp() * (reference - candidate)).sum(dim=-1))
        self.same_top.append(reference.argmax(dim=-1) == candidate.argmax(dim=-1))
        self.reference_nll.append(-reference.gather(1, targets[:, None])[:, 0])
        self.candidate_nll.append(-candidate.gather(1, targets[:, None])[:, 0])

    def result(self, preset: str, *, storage_error: float) -> Quality:
        """The summary of all windows. Raises ValueError where none was added."""
        if not self.kl:
            raise ValueError("nothing was compared")
        kl, same = torch.cat(self.kl).double(), torch.cat(self.same_top).double()
        reference, candidate = torch.cat(self.reference_nll).double(), torch.cat(self.candidate_nll).double()
        count, agreement = len(kl), float(same.mean())
        quantiles = [float(value) for value in torch.quantile(kl, torch.tensor([0.5, 0.9, 0.95, 0.99, 0.999]).double())]
        change = (-candidate).exp() - (-reference).exp()
        perplexity, reference_perplexity = math.exp(float(candidate.mean())), math.exp(float(reference.mean()))
        return Quality(
            preset=preset,
            windows=self.windows,
            tokens_scored=count,
            kl_mean=float(kl.mean()),
            kl_standard_error=_standard_error(kl),
            kl_median=quantiles[0],
            kl_p90=quantiles[1],
            kl_p95=quantiles[2],
            kl_p99=quantiles[3],
            kl_p99_9=quantiles[4],
            kl_max=float(kl.max()),
            top1=agreement,
            top1_standard_error=math.sqrt(agreement * (1 - agreement) / count),
            rms_probability_change=float(change.square().mean().sqrt()),
            perplexity=perplexity,
            perplexity_standard_error=perplexity * _standard_error(candidate),
            reference_perplexity=reference_perplexity,
            storage_error=storage_error,
            perplexity_ratio_standard_error=perplexity / reference_perplexity * _standard_error(candidate - reference),
        )


def _standard_error(values: torch.Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0
