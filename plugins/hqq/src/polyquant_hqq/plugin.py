"""The HQQ backend: its card and its hooks. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyquant import hookimpl
from polyquant.loaded import LoadedModel
from polyquant.options import convert
from polyquant.request import LoadRequest
from polyquant.support.devices import device_problems
from polyquant.support.libraries import import_problems, library_problems
from polyquant.types import BackendInfo, Capabilities, DeviceSupport, LayerInfo, LayerPlan, Library, Problem, WeightInfo

from polyquant_hqq.options import HqqOptions

HQQ = Library(distribution="hqq", versions=">=0.2.8,<0.3")
LIBRARIES = (HQQ, Library(distribution="accelerate", versions=">=1.6"))
CAPABILITIES = Capabilities(
    bits=(1, 2, 3, 4, 8),
    schemes=("hqq1", "hqq2", "hqq3", "hqq4", "hqq8"),
    devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 0))),
    on_the_fly=True,
    loads_prequantized=("hqq",),
    saves=True,
    trains=True,
)


class HqqBackend:
    """Hook implementations; the work is in `_load.py` and `_layers.py`."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        return BackendInfo(
            name="hqq",
            summary="half-quadratic quantization to 1 to 8 bits: good 4 bit and below without calibration",
            capabilities=CAPABILITIES,
            options=HqqOptions,
            docs="https://github.com/dropbox/hqq",
            libraries=LIBRARIES,
            presets={
                "int4": {"bits": 4, "group_size": 64},
                "int8": {"bits": 8, "group_size": 64},
                "int3": {"bits": 3, "group_size": 64},
            },
            compute_dtypes={"cpu": "float32"},
        )

    @hookimpl
    def validate_environment(self, device: str) -> list[Problem]:
        problems = library_problems(LIBRARIES)
        broken = [] if problems else import_problems((HQQ,))
        return problems + broken + device_problems(device, CAPABILITIES)

    @hookimpl
    def build_config(self, options: Mapping[str, object]) -> HqqOptions:
        return convert(HqqOptions, options)

    @hookimpl
    def load(self, request: LoadRequest, config: HqqOptions) -> LoadedModel:
        from polyquant_hqq import _load

        return _load.load(request, config)

    @hookimpl
    def describe_layers(self, model: Any) -> list[LayerInfo]:
        from polyquant_hqq import _layers

        return _layers.describe_layers(model)

    @hookimpl
    def plan_layers(self, weights: Sequence[WeightInfo], config: HqqOptions) -> list[LayerPlan]:
        from polyquant_hqq.planning import plan_layers

        return plan_layers(weights, config)

    @hookimpl
    def save(self, loaded: LoadedModel, out: Path) -> Path:
        from polyquant_hqq import _load

        return _load.save(loaded, out)

    @hookimpl
    def prepare_for_training(self, loaded: LoadedModel) -> Any:
        from polyquant_hqq import _load

        return _load.prepare_for_training(loaded)


backend = HqqBackend()
