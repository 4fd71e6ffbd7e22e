"""Figures of a comparison as people read them. Imports nothing heavy."""

from __future__ import annotations

import math

ZERO = 1e-6
"""Nats: as close as the reference is to itself."""


def with_error(value: float, error: float | None) -> str:
    """Value and error with the digits that the error leaves meaning to: 0.249 ± 0.008."""
    if abs(value) < ZERO and (error or 0) < ZERO:
        return "< 1e-6"
    if not error:
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    exponent = math.floor(math.log10(error))
    digits = max(0, -exponent + (error / 10**exponent < 2))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def significant(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}"


def percent(value: float) -> str:
    """A share in per cent."""
    return f"{value:.1%}"


def ratio(value: float) -> str:
    """A ratio of perplexities: three decimals near 1, fewer far from it."""
    return f"{value:.3f}" if value < 10 else f"{value:.3g}" if value < 1000 else f"{value:.1e}"


def times(value: float) -> str:
    """How many times something is as large: 0.64x."""
    return f"{value:.2f}x"
