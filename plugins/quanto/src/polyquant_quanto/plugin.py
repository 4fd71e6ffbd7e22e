"""The quanto backend: its card. Imports nothing heavy."""

from __future__ import annotations

from polyquant.plugin import BackendInfo, Capabilities, DeviceSupport, Library, PluginBackend

from polyquant_quanto.options import QuantoOptions

QUANTO = Library(distribution="optimum-quanto", versions=">=0.2.7,<0.3", module="optimum.quanto")
INFO = BackendInfo(
    name="quanto",
    summary="int8, float8 and int4 weights while loading, in seconds",
    capabilities=Capabilities(
        bits=(8, 4, 2),
        schemes=("int8", "int4", "int2", "float8"),
        devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 0))),
        on_the_fly=True,
        loads_prequantized=("quanto",),
        saves=True,
        trains=True,
        compiles=True,
    ),
    options=QuantoOptions,
    docs="https://github.com/huggingface/optimum-quanto",
    also_called=("optimum-quanto",),
    libraries=(QUANTO, Library(distribution="accelerate", versions=">=1.6")),
    presets={
        "int8": {"weights": "int8"},
        "int4": {"weights": "int4"},
        "float8": {"weights": "float8"},
    },
    measured_kl={"int8": 0.00261, "int4": 0.415, "float8": 0.0182},
    compute_dtypes={"cpu": "float32"},
)
HOOKS = ("plan_layers", "save", "prepare_for_training", "pack", "quantize_linear", "unpack", "write_unpacked")
backend = PluginBackend(INFO, HOOKS, imports=(QUANTO,), native_problems=True)
