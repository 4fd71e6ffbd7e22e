"""How much a candidate should lose, by what is declared and published: what decides where nothing was measured here.

Bits first; at equal bits a preset that polyquant's authors measured before one that was not, the lower KL before the
higher; then how weights are rounded, then what their codes stand for. Backends declare all of it: options their bits,
`rounding_method` and `number_format`, cards their `measured_kl`.

Published: perplexity of Llama-2-70B on WikiText-2 in llama.cpp's formats, from "Llama 2 70B Scorechart" in the README
of its perplexity tool (k-quants, without importance matrix). Learned rounding before calibrated: AutoRound (arXiv
2309.05516); code books before GPTQ: AQLM (arXiv 2401.06118); calibrated (GPTQ, AWQ) before round-to-nearest: table 4 of
AWQ (arXiv 2306.00978). NF4 before FP4 before INT4: table 2 of QLoRA (arXiv 2305.14314); integers with a zero point
before those without, as Q4_1 before Q4_0 in the scorechart. Fitted before plain rounding, and at 8 bits integers before
floats: the figures of docs/reference/backends.md.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

from polyquant.options import NumberFormat, RoundingMethod
from polyquant.planning.records import Plan

MEASURED_ON = "SmolLM2-135M-Instruct"
SOURCE = "llama.cpp's Llama 2 70B scorechart"
SCORECHART = (
    (3.40, 8.82), (3.47, 7.89), (3.85, 4.72), (4.19, 3.80), (4.53, 1.57), (4.80, 1.20), (5.50, 0.50), (5.65, 0.40),
    (6.56, 0.16),
)  # fmt: skip
"""(bits a weight, perplexity above the dense model's in percent): Q2_K, Q3_K_S/M/L, Q4_K_S/M, Q5_K_S/M, Q6_K."""
METHODS: tuple[RoundingMethod, ...] = ("tuned", "codebook", "calibrated", "fitted", "nearest")
FORMATS: tuple[NumberFormat, ...] = (
    "vectors", "normal floats", "k-quants", "integers with zero points", "floats", "integers",
)  # fmt: skip
FORMATS_OF_8_BITS: tuple[NumberFormat, ...] = (
    "vectors", "k-quants", "integers with zero points", "integers", "normal floats", "floats",
)  # fmt: skip
"""The least lossy first, everything else being equal."""
ROUNDING = {"tuned": "tuned on text", "codebook": "by code books", "calibrated": "calibrated", "fitted": "fitted",
            "nearest": "rounded to nearest"}  # fmt: skip


class Standing(NamedTuple):
    """Where a candidate stands before it is measured here."""

    bits: float  # nominal, of most of its quantized weights
    method: RoundingMethod
    format: NumberFormat
    kl: float | None  # mean, nats, as polyquant's authors measured the preset on MEASURED_ON; None: they did not
    loss_percent: float | None  # published, of so many bits: perplexity above the dense model's; None: not in the chart

    @property
    def order(self) -> tuple[float, bool, float, int, int]:
        """Smaller is better."""
        formats = FORMATS_OF_8_BITS if self.bits >= 8 else FORMATS
        kl = 0.0 if self.kl is None else self.kl
        places = (METHODS.index(self.method), formats.index(self.format))
        return (-min(self.bits, 8.0), self.kl is None, kl, *places)

    @property
    def words(self) -> str:
        """In a clause, each figure with its source."""
        if self.bits >= 16:
            return "dense: nothing is quantized"
        loss = (
            f"about {self.loss_percent:.1f} % perplexity"
            if self.loss_percent is not None
            else "hardly any loss"
            if self.bits >= 8
            else "a heavy loss"
        )
        measured = (
            f"KL {self.kl:.3g} nats on {MEASURED_ON}, measured by polyquant's authors"
            if self.kl is not None
            else "this preset has not been measured"
        )
        return (
            f"{self.bits:g} bits, {self.format} {ROUNDING[self.method]}: {measured}; "
            f"{SOURCE} has {loss} at so many bits"
        )


def standing(plan: Plan) -> Standing:
    """Where a plan stands, by what its options and its backend's card declare."""
    few_levels = plan.level_bits < plan.weight_bits  # int4 is int4, also where each weight takes a byte
    width = plan.level_bits if few_levels else plan.bits_per_weight
    return Standing(plan.level_bits, plan.rounding_method, plan.number_format, plan.measured_kl, _loss(width))


def _loss(bits: float) -> float | None:
    """The chart's loss, between its points in proportion."""
    widths = [width for width, _ in SCORECHART]
    if not widths[0] <= bits <= widths[-1]:
        return None
    index = max(1, bisect_left(widths, bits))
    (low, high_loss), (high, low_loss) = SCORECHART[index - 1], SCORECHART[index]
    return high_loss + (bits - low) / (high - low) * (low_loss - high_loss)
