"""Options of the autogptq backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from polyquant.plugin.formats import GptqFormat, gptq_layout

LAYOUT = "gptq"  # zero points are stored less one; the only one that the library knows


class AutogptqOptions(GptqFormat, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A scale and a zero point for each group of weights, rounded so that calibration text changes least."""

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        """Raises ValueError for a layout or a variant that the library does not know."""
        if (layout := gptq_layout(stored)) != LAYOUT:
            raise ValueError(f"its format is {layout!r}, and {LAYOUT!r} is read; the backend gptq reads more")
        if stored.get("is_marlin_format"):
            raise ValueError("it is packed for Marlin, which is not read")
        if stored.get("dynamic"):
            raise ValueError("it gives layers different options (dynamic), which the backend gptq knows")
        return super().from_stored(stored)
