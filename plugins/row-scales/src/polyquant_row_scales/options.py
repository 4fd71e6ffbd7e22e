"""Options of the EETQ and Gemma backends."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.plugin import BackendOptions, ExpertsOptions, require_read, usual_options

Bits = Literal[2, 4, 8]
COMMON = {"quant_method", "compute_dtype", "modules_to_not_convert"}


class EetqOptions(ExpertsOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights are integers of 8 bits times one scale a row. Activations are not rounded."""

    weights: Annotated[Literal["int8"], Meta(description="what weights are stored as; the format has one kind")] = (
        "int8"
    )

    @property
    def weight_bits(self) -> float:
        return 8

    @property
    def scheme(self) -> str:
        """eetq8."""
        return "eetq8"

    def to_stored(self) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint: transformers' EetqConfig, and the compute dtype."""
        return {
            "quant_method": "eetq", "weights": self.weights, "modules_to_not_convert": self.stored_skip,
            "compute_dtype": self.compute_dtype,
        }  # fmt: skip

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        require_read(stored, {*COMMON, "weights"})
        return msgspec.convert(
            {"weights": stored.get("weights", "int8")} | usual_options(stored, stored.get("modules_to_not_convert")),
            cls,
        )


class GemmaOptions(BackendOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights are integers times one scale a row; activations are rounded where a checkpoint has scales for them."""

    num_bits: Annotated[Bits, Meta(description="bits of a weight, where no pattern of `modules` says otherwise")] = 4
    modules: Annotated[
        tuple[tuple[str, Bits], ...],
        Meta(description="bits of single modules: regular expressions found in a name, and bits; the first counts"),
    ] = ()
    quantize_embeddings: Annotated[
        bool, Meta(description="whether embeddings are integers too; a head that is tied to one is not")
    ] = False

    def __post_init__(self) -> None:
        for pattern, _ in self.modules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"modules: {pattern!r} is no regular expression: {error}") from None

    @property
    def weight_bits(self) -> float:
        return self.num_bits

    @property
    def scheme(self) -> str:
        """gemma2, gemma4 or gemma8."""
        return f"gemma{self.num_bits}"

    @property
    def rounds_activations(self) -> bool:
        return True

    def of_module(self, name: str) -> GemmaOptions:
        """The same with the bits that the module of that name has."""
        bits = next((bits for pattern, bits in self.modules if re.search(pattern, name)), self.num_bits)
        return msgspec.structs.replace(self, num_bits=bits, modules=())

    def to_stored(self) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint: transformers' GemmaQuantizationConfig, and the compute dtype."""
        return {
            "quant_method": "gemma", "num_bits": self.num_bits, "quantize_embeddings": self.quantize_embeddings,
            "module_quant_configs": {pattern: {"num_bits": bits} for pattern, bits in self.modules} or None,
            "modules_to_not_convert": self.stored_skip, "compute_dtype": self.compute_dtype,
        }  # fmt: skip

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        require_read(stored, {*COMMON, "num_bits", "quantize_embeddings", "module_quant_configs"})
        bits, modules = stored.get("num_bits", 4), stored.get("module_quant_configs") or {}
        for pattern, own in modules.items():
            if unread := sorted(set(own) - {"num_bits"}):
                raise ValueError(f"its module_quant_configs has {', '.join(unread)} for {pattern!r}, which is not read")
        values = {
            "num_bits": bits,
            "modules": [(pattern, own.get("num_bits", bits)) for pattern, own in modules.items()],
            "quantize_embeddings": bool(stored.get("quantize_embeddings")),
        }
        return msgspec.convert(values | usual_options(stored, stored.get("modules_to_not_convert")), cls)
