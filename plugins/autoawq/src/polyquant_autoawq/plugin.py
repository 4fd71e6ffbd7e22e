"""The autoawq backend: its card and its hooks. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyquant.plugin import (
    BackendInfo,
    Capabilities,
    DeviceSupport,
    Isolated,
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

from polyquant_autoawq.options import AutoawqOptions

AUTOAWQ = Library(distribution="autoawq", versions="==0.2.9", module="awq")
LIBRARIES = (AUTOAWQ, Library(distribution="transformers", versions=">=4.51,<4.52"))
ISOLATED = Isolated(
    reason="autoawq 0.2.9 is archived, and imports nothing newer than transformers 4.51.3",
    requirements=(
        "torch==2.13.0", "transformers==4.51.3", "accelerate==1.6.0", "datasets==5.0.1", "zstandard==0.25.0",
    ),
    without_dependencies=("autoawq==0.2.9",),  # it asks for triton, which it can do without
)  # fmt: skip
CAPABILITIES = Capabilities(
    bits=(4,),
    schemes=("awq4",),
    devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 5))),
    needs_calibration=True,
    loads_prequantized=("awq",),
)


class AutoawqBackend:
    """Hook implementations; the work is in `_load.py`, `_quantize.py` and `_layers.py`."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        return BackendInfo(
            name="autoawq",
            summary="AutoAWQ 0.2.9, archived: reads AWQ checkpoints and makes them, in an environment of its own",
            capabilities=CAPABILITIES,
            options=AutoawqOptions,
            docs="https://github.com/casper-hansen/AutoAWQ",
            libraries=LIBRARIES,
            presets={"int4": {"group_size": 64}},
            compute_dtypes={"cpu": "float32"},
            isolated=ISOLATED,
        )

    @hookimpl
    def validate_environment(self, device: str) -> list[Problem]:
        problems = library_problems(LIBRARIES)
        broken = [] if problems else import_problems((AUTOAWQ,))
        return problems + broken + device_problems(device, CAPABILITIES)

    @hookimpl
    def build_config(self, options: Mapping[str, object]) -> AutoawqOptions:
        return convert(AutoawqOptions, options)

    @hookimpl
    def load(self, request: LoadRequest, config: AutoawqOptions) -> LoadedModel:
        from polyquant_autoawq import _load

        return _load.load(request, config)

    @hookimpl
    def describe_layers(self, model: Any) -> list[LayerInfo]:
        from polyquant_autoawq import _layers

        return _layers.describe_layers(model)

    @hookimpl
    def plan_layers(self, weights: Sequence[WeightInfo], config: AutoawqOptions) -> list[LayerPlan]:
        from polyquant_autoawq.planning import plan_layers

        return plan_layers(weights, config)

    @hookimpl
    def quantize(self, request: LoadRequest, config: AutoawqOptions, calibration: Sequence[str], out: Path) -> Path:
        from polyquant_autoawq import _quantize

        return _quantize.quantize(request, config, calibration, out)


backend = AutoawqBackend()
