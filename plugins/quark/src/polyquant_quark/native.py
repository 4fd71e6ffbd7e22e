"""Quark's own config of a weight. Imports amd-quark."""

from __future__ import annotations

from typing import Any

from quark.torch.quantization.config import config as quark

from polyquant_quark.options import QuarkOptions


def tensor_config(options: QuarkOptions) -> Any:
    """The QTensorConfig of the weights."""
    group: dict[str, Any] = {"ch_axis": -1, "group_size": options.group_size}
    channel: dict[str, Any] = {"ch_axis": 0}
    rounding: dict[str, Any] = {"symmetric": True, "scale_type": "float", "round_method": "half_even"}
    shifted = {**rounding, "symmetric": False}
    static: dict[str, Any] = {"is_dynamic": False}
    makers = {
        ("int4", "group"): lambda: quark.Int4PerGroupSpec(**group),
        ("int4", "channel"): lambda: quark.Int4PerChannelSpec(**channel),
        ("uint4", "group"): lambda: quark.Uint4PerGroupSpec(**group, **shifted, **static),
        ("uint4", "channel"): lambda: quark.Uint4PerChannelSpec(**channel, **shifted, **static),
        ("int8", "channel"): lambda: quark.Int8PerChannelSpec(**channel, **rounding, **static),
        ("int8", "group"): lambda: quark.Int8PerGroupSpec(**group, **rounding, **static),
        ("fp8", "channel"): lambda: quark.FP8E4M3PerChannelSpec(**channel, **static),
        ("fp8", "tensor"): lambda: quark.FP8E4M3PerTensorSpec(observer_method="min_max", **static),
        ("mxfp4", "group"): lambda: quark.OCP_MXFP4Spec(ch_axis=-1, **static),
    }
    return makers[options.weights, options.granularity or ""]().to_quantization_spec()
