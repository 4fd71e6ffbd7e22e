"""How much a candidate loses, by what is published: bits a weight first, then the kind of scheme.

Bits: perplexity of Llama-2-70B on WikiText-2 in llama.cpp's formats, from "Llama 2 70B Scorechart" in the README of its
perplexity tool (k-quants, without importance matrix). Schemes of equal bits: NF4 before FP4 before INT4 in table 2 of
QLoRA (arXiv 2305.14314); calibrated 4-bit integers (GPTQ, AWQ) before round-to-nearest in table 4 of AWQ (arXiv
2306.00978); integers with a zero point before those without, as Q4_1 before Q4_0 in the scorechart.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

from polyquant.planning.records import Plan

SOURCE = "llama.cpp's Llama 2 70B scorechart"
SCORECHART = (
    (3.40, 8.82), (3.47, 7.89), (3.85, 4.72), (4.19, 3.80), (4.53, 1.57), (4.80, 1.20), (5.50, 0.50), (5.65, 0.40),
    (6.56, 0.16),
)  # fmt: skip
"""(bits a weight, perplexity above the dense model's in percent): Q2_K, Q3_K_S/M/L, Q4_K_S/M, Q5_K_S/M, Q6_K."""
KINDS = (
    ("calibrated", ("gptq", "awq", "int4-act-order", "auto-round")),
    ("normal floats", ("nf4",)),
    ("k-quants", ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")),
    ("integers with zero points", ("hqq", "sinq", "uint4", "q4_1", "q5_1")),
    ("8-bit integers", ("int8", "q8_0")),
    ("floats", ("fp8", "float8", "fp4", "mxfp4", "nvfp4")),
)
"""Kinds of schemes, the least lossy first at equal bits; what is not named is plain rounding."""
CALIBRATED = 0


class Published(NamedTuple):
    """Where a candidate stands by what is published."""

    bits: float  # nominal, of most of its quantized weights
    kind: str
    loss_percent: float | None  # perplexity above the dense model's; None: below what the chart covers
    order: tuple[float, int]  # smaller is better

    @property
    def words(self) -> str:
        """In a clause, with the source."""
        loss = (
            f"about {self.loss_percent:.1f} % perplexity at so many bits"
            if self.loss_percent is not None
            else "hardly any loss at so many bits"
            if self.bits >= 8
            else "a heavy loss at so few bits"
        )
        return f"{self.bits:g} bits, {self.kind}: {loss} ({SOURCE})"


def published(plan: Plan, *, calibrated: bool = False) -> Published:
    """The place of a plan on the scale."""
    quantized = [tensor for tensor in plan.tensors if tensor.quantized]
    if not quantized:
        return Published(16, "dense", None, (-16, 0))
    largest = max(quantized, key=lambda tensor: tensor.stored_bytes)
    words = f"{plan.backend} {largest.scheme}".lower()
    rank, kind = next(
        ((rank, kind) for rank, (kind, names) in enumerate(KINDS) if any(name in words for name in names)),
        (len(KINDS), "plain rounding"),
    )
    if calibrated:
        rank, kind = CALIBRATED, KINDS[CALIBRATED][0]
    bits = 4.0 if "int4" in words else largest.bits  # four bits are four bits, also where each takes a byte
    width = plan.bits_per_weight if bits == largest.bits else bits
    return Published(bits, kind, _loss(width), (-min(bits, 8.0), rank))


def _loss(bits: float) -> float | None:
    """The chart's loss, between its points in proportion."""
    widths = [width for width, _ in SCORECHART]
    if not widths[0] <= bits <= widths[-1]:
        return None
    index = max(1, bisect_left(widths, bits))
    (low, high_loss), (high, low_loss) = SCORECHART[index - 1], SCORECHART[index]
    return high_loss + (bits - low) / (high - low) * (low_loss - high_loss)
