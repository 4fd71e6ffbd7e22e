"""The library's own config."""

from __future__ import annotations

from fouroversix import QuantizationConfig, QuantizeBackend

from polyquant_fouroversix.options import FouroversixOptions


def quantize_config(config: FouroversixOptions) -> QuantizationConfig:
    """The options as the library takes them for a tensor, with its PyTorch quantizer."""
    return QuantizationConfig(
        backend=QuantizeBackend.pytorch,
        block_scale_2d=config.weight_scale_2d,
        dtype=config.dtype,
        scale_rule=config.scale_rule,
    )
