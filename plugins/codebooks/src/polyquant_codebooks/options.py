"""What the options of the formats have in common: which tensors a layer has, and how its checkpoint is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from polyquant.plugin import BackendOptions, NumberFormat, RoundingMethod, require_read, usual_options

Layout = Mapping[str, tuple[tuple[int, ...], str]]
"""Name of a layer's tensor in a checkpoint -> its shape and dtype."""
COMMON = {"quant_method", "compute_dtype", "modules_to_not_convert", "skip_modules"}


class CodebookOptions(BackendOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights come from tables, by codes that are found in a stream of bits."""

    mark: ClassVar[str]
    """The tensor by which a packed layer is known."""
    inside: ClassVar[tuple[str, ...]] = ()
    """Ends of what a checkpoint has its tensors in, where they are in modules of their own."""

    @property
    def rounding_method(self) -> RoundingMethod:
        return "codebook"

    @property
    def number_format(self) -> NumberFormat:
        return "vectors"

    def bits_of(self, name: str) -> float:
        """Nominal bits of a weight of the module of that name."""
        return self.weight_bits

    def layout(self, name: str, shape: Sequence[int]) -> Layout:
        """The tensors of the module of that name, whose weight is (out_features, in_features).

        Raises ValueError, with what is wrong, where the format has no place for it.
        """
        raise NotImplementedError


def require_known(stored: Mapping[str, Any], *more: str) -> None:
    """Raises ValueError for settings of a quantization_config that are neither COMMON nor one of these."""
    require_read(stored, {*COMMON, *more})


def common(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The options that every format has."""
    return usual_options(stored, stored.get("skip_modules", stored.get("modules_to_not_convert")))
