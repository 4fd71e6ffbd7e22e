"""The Quark backend: its card. Imports nothing heavy."""

from __future__ import annotations

from polyquant.plugin import BackendInfo, Capabilities, DeviceSupport, Library, PluginBackend

from polyquant_quark.options import QuarkOptions

INFO = BackendInfo(
    name="quark",
    summary="checkpoints of AMD Quark: int4, uint4, int8, fp8 and mxfp4 weights, kept packed",
    capabilities=Capabilities(
        bits=(4, 8),
        schemes=("int4", "uint4", "int8", "fp8", "mxfp4"),
        devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 0))),
        loads_prequantized=("quark",),
        saves=True,
        readable_by=("transformers",),
        trains=True,
    ),
    options=QuarkOptions,
    docs="https://quark.docs.amd.com",
    also_called=("amd-quark",),
    libraries=(Library(distribution="accelerate", versions=">=1.6"),),  # amd-quark is needed to quantize only
    presets={
        "int4": {"weights": "int4", "group_size": 64},
        "int8": {"weights": "int8"},
        "fp8": {"weights": "fp8"},
        "mxfp4": {"weights": "mxfp4"},
    },
    measured_kl={"int4": 0.396, "int8": 0.00298, "fp8": 0.0182, "mxfp4": 0.38},
    compute_dtypes={"cpu": "float32"},
)
backend = PluginBackend(INFO, ("plan_layers", "quantize", "save", "prepare_for_training", "pack"))
