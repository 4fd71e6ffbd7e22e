"""The quanto backend: its card and its hooks. Imports nothing heavy."""

from __future__ import annotations

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

from polyquant_quanto.options import QuantoOptions

QUANTO = Library(distribution="optimum-quanto", versions=">=0.2.7,<0.3", module="optimum.quanto")
LIBRARIES = (QUANTO, Library(distribution="accelerate", versions=">=1.6"))
CAPABILITIES = Capabilities(
    bits=(8, 4, 2),
    schemes=("int8", "int4", "int2", "float8"),
    devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 0))),
    on_the_fly=True,
    loads_prequantized=("quanto",),
    saves=True,
    trains=True,
)


class QuantoBackend:
    """Hook implementations; the work is in `_load.py` and `_layers.py`."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        return BackendInfo(
            name="quanto",
            summary="int8, float8 and int4 weights while loading, in seconds",
            capabilities=CAPABILITIES,
            options=QuantoOptions,
            docs="https://github.com/huggingface/optimum-quanto",
            libraries=LIBRARIES,
            presets={
                "int8": {"weights": "int8"},
                "int4": {"weights": "int4"},
                "float8": {"weights": "float8"},
            },
            compute_dtypes={"cpu": "float32"},
        )

    @hookimpl
    def validate_environment(self, device: str) -> list[Problem]:
        problems = library_problems(LIBRARIES)
        broken = [] if problems else import_problems((QUANTO,))
        problems += broken + device_problems(device, CAPABILITIES)
        if not problems:
            from polyquant_quanto._load import native_problems

            problems += native_problems(device)
        return problems

    @hookimpl
    def build_config(self, options: Mapping[str, object]) -> QuantoOptions:
        return convert(QuantoOptions, options)

    @hookimpl
    def load(self, request: LoadRequest, config: QuantoOptions) -> LoadedModel:
        from polyquant_quanto import _load

        return _load.load(request, config)

    @hookimpl
    def describe_layers(self, model: Any) -> list[LayerInfo]:
        from polyquant_quanto import _layers

        return _layers.describe_layers(model)

    @hookimpl
    def plan_layers(self, weights: Sequence[WeightInfo], config: QuantoOptions) -> list[LayerPlan]:
        from polyquant_quanto.planning import plan_layers

        return plan_layers(weights, config)

    @hookimpl
    def save(self, loaded: LoadedModel, out: Path) -> Path:
        from polyquant_quanto import _load

        return _load.save(loaded, out)

    @hookimpl
    def prepare_for_training(self, loaded: LoadedModel) -> Any:
        from polyquant_quanto import _load

        return _load.prepare_for_training(loaded)


backend = QuantoBackend()
