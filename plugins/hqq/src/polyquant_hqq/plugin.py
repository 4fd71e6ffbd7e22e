"""The HQQ backend: its card. Imports nothing heavy."""

from __future__ import annotations

from polyquant.plugin import BackendInfo, Capabilities, DeviceSupport, Library, PluginBackend

from polyquant_hqq.options import HqqOptions

HQQ = Library(distribution="hqq", versions=">=0.2.8,<0.3")
INFO = BackendInfo(
    name="hqq",
    summary="half-quadratic quantization to 1 to 8 bits: good 4 bit and below without calibration",
    capabilities=Capabilities(
        bits=(1, 2, 3, 4, 8),
        schemes=("hqq1", "hqq2", "hqq3", "hqq4", "hqq8"),
        devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 0))),
        on_the_fly=True,
        loads_prequantized=("hqq",),
        saves=True,
        trains=True,
        compiles=True,
    ),
    options=HqqOptions,
    docs="https://github.com/dropbox/hqq",
    libraries=(HQQ, Library(distribution="accelerate", versions=">=1.6")),
    presets={
        "int4": {"bits": 4, "group_size": 64},
        "int8": {"bits": 8, "group_size": 64},
        "int3": {"bits": 3, "group_size": 64},
    },
    measured_kl={"int4": 0.189, "int8": 0.000738, "int3": 1.77},
    compute_dtypes={"cpu": "float32"},
)
backend = PluginBackend(
    INFO, ("plan_layers", "save", "prepare_for_training", "pack", "quantize_linear", "unpack"), imports=(HQQ,)
)
