"""The SINQ backend: its card and its hooks. Imports nothing heavy."""

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

from polyquant_sinq.options import SinqOptions

SINQ = Library(
    distribution="sinq", versions=">=0.2,<0.3", module="sinq.quantizer",
    caution="in an environment of its own, or with SINQ_AUTO_PATCH=0: it imports transformers at every Python start",
)  # fmt: skip
LIBRARIES = (SINQ, Library(distribution="accelerate", versions=">=1.6"))
CAPABILITIES = Capabilities(
    bits=(2, 3, 4, 5, 6, 8),
    schemes=("sinq2", "sinq3", "sinq4", "sinq5", "sinq6", "sinq8"),
    devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 0))),
    on_the_fly=True,
    loads_prequantized=("sinq",),
    saves=True,
    trains=True,
)


class SinqBackend:
    """Hook implementations; the work is in `_load.py` and `_layers.py`."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        return BackendInfo(
            name="sinq",
            summary="2 to 8 bits with Sinkhorn-normalized scales: good 4 bit without calibration, in seconds",
            capabilities=CAPABILITIES,
            options=SinqOptions,
            docs="https://github.com/huawei-csl/SINQ",
            libraries=LIBRARIES,
            presets={
                "int4": {"bits": 4, "group_size": 64},
                "int8": {"bits": 8, "group_size": 64},
            },
            compute_dtypes={"cpu": "float32"},
        )

    @hookimpl
    def validate_environment(self, device: str) -> list[Problem]:
        problems = library_problems(LIBRARIES)
        broken = [] if problems else import_problems((SINQ,))
        return problems + broken + device_problems(device, CAPABILITIES)

    @hookimpl
    def build_config(self, options: Mapping[str, object]) -> SinqOptions:
        return convert(SinqOptions, options)

    @hookimpl
    def load(self, request: LoadRequest, config: SinqOptions) -> LoadedModel:
        from polyquant_sinq import _load

        return _load.load(request, config)

    @hookimpl
    def describe_layers(self, model: Any) -> list[LayerInfo]:
        from polyquant_sinq import _layers

        return _layers.describe_layers(model)

    @hookimpl
    def plan_layers(self, weights: Sequence[WeightInfo], config: SinqOptions) -> list[LayerPlan]:
        from polyquant_sinq.planning import plan_layers

        return plan_layers(weights, config)

    @hookimpl
    def save(self, loaded: LoadedModel, out: Path) -> Path:
        from polyquant_sinq import _load

        return _load.save(loaded, out)

    @hookimpl
    def prepare_for_training(self, loaded: LoadedModel) -> Any:
        from polyquant_sinq import _load

        return _load.prepare_for_training(loaded)


backend = SinqBackend()
