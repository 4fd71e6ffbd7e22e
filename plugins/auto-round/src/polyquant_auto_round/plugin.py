"""The AutoRound backend: its card. Imports nothing heavy."""

from __future__ import annotations

import platform

from polyquant.plugin import BackendInfo, Capabilities, DeviceSupport, Library, PluginBackend

from polyquant_auto_round.options import AutoRoundOptions

LIBRARY = Library(distribution="auto-round-lib", versions=">=0.16,<0.17", module="auto_round_kernel")
KERNELS = (LIBRARY,) if platform.machine() in ("x86_64", "AMD64") else ()  # not published for other processors
INFO = BackendInfo(
    name="auto-round",
    summary="checkpoints of 2 to 8 bits with fast CPU kernels: plain rounding, or tuned with calibration text",
    capabilities=Capabilities(
        bits=(2, 3, 4, 8),
        schemes=("int2", "int3", "int4", "int8", "uint2", "uint3", "uint4"),
        devices=(DeviceSupport(type="cpu"),),
        loads_prequantized=("auto-round", "gptq", "awq"),
        trains=True,
    ),
    options=AutoRoundOptions,
    docs="https://github.com/intel/auto-round",
    also_called=("autoround", "auto_round"),
    libraries=(
        Library(distribution="auto-round", versions=">=0.16,<0.17", module="auto_round"),
        *KERNELS,
        Library(distribution="accelerate", versions=">=1.6"),
    ),
    presets={
        "rtn-int4": {"bits": 4, "group_size": 64, "iters": 0},
        "int4": {"bits": 4, "group_size": 64, "iters": 20},
        "rtn-int8": {"bits": 8, "group_size": 64, "iters": 0},
    },
    measured_kl={"rtn-int4": 0.315, "int4": 0.115, "rtn-int8": 0.00612},
    compute_dtypes={"cpu": "bfloat16"},
)
backend = PluginBackend(INFO, ("plan_layers", "quantize", "prepare_for_training", "pack"), imports=KERNELS)
