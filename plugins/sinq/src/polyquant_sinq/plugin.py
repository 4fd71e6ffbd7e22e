"""The SINQ backend: its card. Imports nothing heavy."""

from __future__ import annotations

from polyquant.plugin import BackendInfo, Capabilities, DeviceSupport, Library, PluginBackend

from polyquant_sinq.options import SinqOptions

SINQ = Library(
    distribution="sinq", versions=">=0.2,<0.3", module="sinq.quantizer",
    caution="in an environment of its own, or with SINQ_AUTO_PATCH=0: it imports transformers at every Python start",
)  # fmt: skip
INFO = BackendInfo(
    name="sinq",
    summary="2 to 8 bits with Sinkhorn-normalized scales: good 4 bit without calibration, in seconds",
    capabilities=Capabilities(
        bits=(2, 3, 4, 5, 6, 8),
        schemes=("sinq2", "sinq3", "sinq4", "sinq5", "sinq6", "sinq8"),
        devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 0))),
        on_the_fly=True,
        loads_prequantized=("sinq",),
        saves=True,
        trains=True,
    ),
    options=SinqOptions,
    docs="https://github.com/huawei-csl/SINQ",
    libraries=(SINQ, Library(distribution="accelerate", versions=">=1.6")),
    presets={
        "int4": {"bits": 4, "group_size": 64},
        "int8": {"bits": 8, "group_size": 64},
    },
    measured_kl={"int4": 0.201, "int8": 0.00122},
    compute_dtypes={"cpu": "float32"},
)
backend = PluginBackend(
    INFO, ("plan_layers", "save", "prepare_for_training", "pack", "quantize_linear"), imports=(SINQ,)
)
