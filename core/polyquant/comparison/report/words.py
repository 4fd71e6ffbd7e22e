"""Figures and conditions of a comparison in words. Imports nothing heavy."""

from __future__ import annotations

import math
import textwrap

from polyquant.comparison.records import Comparison
from polyquant.support.machine import Machine
from polyquant.support.sizes import size

ZERO = 1e-6
"""Nats: as close as the reference is to itself."""


def uncertain(value: float | None, error: float | None) -> str:
    """Value and error with the digits that the error leaves meaning to: 0.249 ± 0.008. Empty for None."""
    if value is None:
        return ""
    if abs(value) < ZERO and (error or 0) < ZERO:
        return "< 1e-6"
    if not error:
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    exponent = math.floor(math.log10(error))
    digits = max(0, -exponent + (error / 10**exponent < 2))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def share(value: float | None) -> str:
    """A share in per cent."""
    return "" if value is None else f"{value:.1%}"


def times(value: float | None) -> str:
    """A ratio of perplexities: three decimals near 1, fewer far from it."""
    if value is None:
        return ""
    return f"{value:.3f}" if value < 10 else f"{value:.3g}" if value < 1000 else f"{value:.1e}"


def bfloat16_share(value: float | None) -> str:
    """Bytes over those of the dense model in bfloat16."""
    return "" if value is None else f"{value:.2f}x"


def first_line(reason: str) -> str:
    """A reason without what the process said last."""
    return reason.strip().partition("\n")[0].removesuffix("; it said last:")


def last_lines(reason: str) -> str:
    """What the process said last."""
    return textwrap.dedent(reason.strip().partition("\n")[2])


def machine_words(machine: Machine) -> str:
    """Processor, cores, memory."""
    return f"{machine.processor}, {machine.cores} core{'s'[: machine.cores != 1]}, {size(machine.memory_bytes)}"


def quality_words(comparison: Comparison) -> str:
    """What the quality figures were measured on; empty where none were."""
    setting = comparison.setting
    scored = {row.result.quality.tokens_scored for row in comparison.done if row.result and row.result.quality}
    if not scored:
        return ""
    tokens = f"{min(scored)} tokens" if len(scored) == 1 else f"{min(scored)} to {max(scored)} tokens"
    cut = f"{setting.windows} window{'s'[: setting.windows != 1]}, " if setting.windows else ""
    return f"KL against {setting.reference} on {setting.text} ({setting.preset}, {cut}{tokens} scored)"


def conditions(comparison: Comparison) -> str:
    """One line on what all of it was measured on."""
    parts = (
        comparison.setting.model,
        quality_words(comparison),
        f"device {comparison.setting.device}: {machine_words(comparison.machine)}",
        f"polyquant {comparison.version}, {comparison.created[:10]}",
    )
    return "; ".join(part for part in parts if part)
