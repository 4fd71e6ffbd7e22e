"""The BitNet backend: its card. Imports nothing heavy."""

from __future__ import annotations

from polyquant.plugin import BackendInfo, Capabilities, DeviceSupport, Library, PluginBackend

from polyquant_bitnet.options import BitnetOptions

LIBRARIES = (
    Library(distribution="transformers", versions=">=4.52"),
    Library(distribution="accelerate", versions=">=1.6"),
)
INFO = BackendInfo(
    name="bitnet",
    summary="reads BitNet b1.58 checkpoints: weights -1, 0 and 1 in two bits, activations in int8",
    capabilities=Capabilities(
        bits=(2,),
        schemes=("ternary-a8",),
        devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 0))),
        loads_prequantized=("bitnet",),
        saves=True,
        readable_by=("transformers",),
        trains=True,
    ),
    options=BitnetOptions,
    docs="https://github.com/microsoft/BitNet",
    libraries=LIBRARIES,
    presets={
        "bitlinear": {"linear_class": "bitlinear"},
        "autobitlinear": {"linear_class": "autobitlinear"},
    },
    measured_kl={"bitlinear": 14.7, "autobitlinear": 14.7},
    compute_dtypes={"cpu": "float32"},
)
backend = PluginBackend(INFO, ("plan_layers", "save", "prepare_for_training"), imports=LIBRARIES)
