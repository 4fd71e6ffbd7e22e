"""Options of the BitNet backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.plugin import BackendOptions, require_read, usual_options

OWN = ("linear_class", "quantization_mode", "use_rms_norm", "rms_norm_eps")
READ = {"quant_method", "modules_to_not_convert", "compute_dtype", *OWN}


class BitnetOptions(BackendOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights are -1, 0 or 1 times one scale a layer; activations are rounded to int8, token by token, in each pass."""

    linear_class: Annotated[
        Literal["bitlinear", "autobitlinear"],
        Meta(description="how the checkpoint states a layer's scale: to divide by (bitlinear), or to multiply with"),
    ] = "bitlinear"
    quantization_mode: Annotated[
        Literal["offline", "online"],
        Meta(
            description="offline: the checkpoint holds packed weights; online: dense ones, which are packed on loading"
        ),
    ] = "offline"
    use_rms_norm: Annotated[bool, Meta(description="normalize the input of each layer, with weights of its own")] = (
        False
    )
    rms_norm_eps: Annotated[float, Meta(gt=0, description="epsilon of that norm")] = 1e-6

    def __post_init__(self) -> None:
        if self.quantization_mode == "online" and self.linear_class == "bitlinear":
            raise ValueError(
                "quantization_mode 'online' goes with linear_class 'autobitlinear'; bitlinear holds packed weights"
            )

    @property
    def weight_bits(self) -> float:
        """2 as stored; three values are log2(3) = 1.58 bits."""
        return 2

    def to_stored(self) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint, as BitNetQuantConfig has it, and `compute_dtype`."""
        return {
            "quant_method": "bitnet",
            "modules_to_not_convert": self.stored_skip,
            **{name: getattr(self, name) for name in OWN},
            "compute_dtype": self.compute_dtype,
        }

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        require_read(stored, READ)
        values = {name: stored[name] for name in OWN if stored.get(name) is not None}
        return msgspec.convert(values | usual_options(stored, stored.get("modules_to_not_convert")), cls)
