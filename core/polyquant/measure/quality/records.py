"""The record of a quality measurement. Imports nothing heavy."""

from __future__ import annotations

from polyquant.types import Record


class Quality(Record, frozen=True):
    """A candidate against the reference on the same tokens. Over the scored positions, the whole vocabulary each."""

    preset: str
    windows: int
    tokens_scored: int
    kl_mean: float  # KL(reference || candidate), nats a position
    kl_standard_error: float
    kl_median: float
    kl_p90: float
    kl_p95: float
    kl_p99: float
    kl_p99_9: float
    kl_max: float
    top1: float  # share of positions where both put the same token first
    top1_standard_error: float  # binomial
    rms_probability_change: float  # of the correct token
    perplexity: float  # exp of the mean negative log-likelihood of the correct token
    perplexity_standard_error: float
    reference_perplexity: float
    storage_error: float  # KL(reference as stored || reference), nats: what the reference's storage format adds
    perplexity_ratio_standard_error: float | None = None  # on the same tokens; None: measured before it was kept

    @property
    def perplexity_ratio(self) -> float:
        """The candidate's perplexity over the reference's."""
        return self.perplexity / self.reference_perplexity
