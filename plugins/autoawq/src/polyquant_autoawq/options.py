"""Options of the autoawq backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from polyquant.plugin.formats import GEMM, AwqFormat, has_zero_points


class AutoawqOptions(AwqFormat, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Columns that calibration text activates most are scaled up before rounding, so that they lose least."""

    def quantize_config(self) -> dict[str, Any]:
        """The library's `quant_config`, for the modules that `skip` does not name."""
        return {
            "zero_point": True, "q_group_size": self.group_size, "w_bit": self.bits, "version": GEMM.upper(),
            "modules_to_not_convert": list(self.skip) or None,
        }  # fmt: skip

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        """Raises ValueError for a variant that the library does not run on every device."""
        config = super().from_stored(stored)
        if not has_zero_points(stored):
            raise ValueError("it has no zero points (zero_point is false), and layers with them are read")
        return config
