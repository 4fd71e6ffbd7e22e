"""The AutoRound backend: its card and its hooks. Imports nothing heavy."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyquant.plugin import (
    BackendInfo,
    Capabilities,
    DeviceSupport,
    LayerInfo,
    LayerPlan,
    Library,
    LoadedModel,
    LoadRequest,
    Problem,
    WeightInfo,
    convert,
    device_problems,
    hookimpl,
    import_problems,
    library_problems,
)

from polyquant_auto_round.options import AutoRoundOptions

KERNELS = Library(distribution="auto-round-lib", versions=">=0.16,<0.17", module="auto_round_kernel")
LIBRARIES = (
    Library(distribution="auto-round", versions=">=0.16,<0.17", module="auto_round"),
    *((KERNELS,) if platform.machine() in ("x86_64", "AMD64") else ()),  # not published for other processors
    Library(distribution="accelerate", versions=">=1.6"),
)
CAPABILITIES = Capabilities(
    bits=(2, 3, 4, 8),
    schemes=("int2", "int3", "int4", "int8", "uint2", "uint3", "uint4"),
    devices=(DeviceSupport(type="cpu"),),
    loads_prequantized=("auto-round", "gptq", "awq"),
    trains=True,
)


class AutoRoundBackend:
    """Hook implementations; the work is in `_quantize.py`, `_load.py` and `_layers.py`."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        return BackendInfo(
            name="auto-round",
            summary="checkpoints of 2 to 8 bits with fast CPU kernels: plain rounding, or tuned with calibration text",
            capabilities=CAPABILITIES,
            options=AutoRoundOptions,
            docs="https://github.com/intel/auto-round",
            libraries=LIBRARIES,
            presets={
                "rtn-int4": {"bits": 4, "group_size": 64, "iters": 0},
                "int4": {"bits": 4, "group_size": 64, "iters": 20},
                "rtn-int8": {"bits": 8, "group_size": 64, "iters": 0},
            },
            compute_dtypes={"cpu": "bfloat16"},
        )

    @hookimpl
    def validate_environment(self, device: str) -> list[Problem]:
        problems = library_problems(LIBRARIES)
        broken = [] if problems else import_problems(LIBRARIES[1:-1])
        return problems + broken + device_problems(device, CAPABILITIES)

    @hookimpl
    def build_config(self, options: Mapping[str, object]) -> AutoRoundOptions:
        return convert(AutoRoundOptions, options)

    @hookimpl
    def load(self, request: LoadRequest, config: AutoRoundOptions) -> LoadedModel:
        from polyquant_auto_round import _load

        return _load.load(request, config)

    @hookimpl
    def describe_layers(self, model: Any) -> list[LayerInfo]:
        from polyquant_auto_round import _layers

        return _layers.describe_layers(model)

    @hookimpl
    def plan_layers(self, weights: Sequence[WeightInfo], config: AutoRoundOptions) -> list[LayerPlan]:
        from polyquant_auto_round.planning import plan_layers

        return plan_layers(weights, config)

    @hookimpl
    def quantize(self, request: LoadRequest, config: AutoRoundOptions, calibration: Sequence[str], out: Path) -> Path:
        from polyquant_auto_round import _quantize

        return _quantize.quantize(request, config, calibration, out)

    @hookimpl
    def prepare_for_training(self, loaded: LoadedModel) -> Any:
        from polyquant_auto_round import _layers

        return _layers.prepare_for_training(loaded)


backend = AutoRoundBackend()
